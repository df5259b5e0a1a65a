"""Ranks to run trainers on, started once for all tests of the room."""

import warnings
from collections.abc import Iterator

import pytest

from tests.losses.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that act as ranks of a gloo group."""
    started = Ranks(tmp_path_factory.mktemp("ranks"), largest=2)
    # They fail on warnings, of which importing Ignite gives one.
    ignored = ("ignore", "`torch.jit", DeprecationWarning)
    started.run(warnings.filterwarnings, [ignored] * 2)
    yield started
    started.close()
