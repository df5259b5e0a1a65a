"""Set-up of every test: one thread, one seed, a Hypothesis profile, skips with a reason."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.losses.ranks import Ranks

# No deadline: two workers share two cores. Derandomised: a red run is red again.
settings.register_profile("diptych", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("diptych")

# Data that a module draws when it is imported is the same in every worker.
torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def may_wait() -> Iterator[None]:
    """Let the device be waited for after a test that forbids it, however that test ends."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Processes that act as ranks of a gloo group, each started once."""
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()
