"""Processes that act as ranks, started once for all tests of losses."""

from collections.abc import Iterator

import pytest

from tests.losses.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three processes that act as ranks of a gloo group."""
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()
