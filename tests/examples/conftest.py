"""Fixtures of the tests of the examples."""

from __future__ import annotations

import pytest

from examples.emoji.data import Emoji, read_emoji


@pytest.fixture(scope="session")
def emoji() -> list[Emoji]:
    return read_emoji()
