"""The first batches of a loader, read without changing the loader or a random generator."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from diptych.engine.data.loader_contract import (
    ListLoader,
    generator_states,
    set_generator_states,
)
from diptych.engine.random_state import preserved_random_state


def first_batches(loader: Iterable[Any], count: int = 1) -> list[Any]:
    """Return the first batches of a new pass, fewer if the loader has fewer.

    The pass is made by a shallow copy of the loader: its own position stays. Loaders whose position
    is somewhere else, in an open file for example, are read on.

    Raises:
        TypeError: if the loader can be iterated only once, or not at all.
    """
    if isinstance(loader, Iterator) or not (
        hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    ):
        raise TypeError(
            "loader must be an object that can be iterated again, got a "
            f"{type(loader).__name__}. Pass a DataLoader or a list of batches"
        )
    generators = generator_states(loader)
    with preserved_random_state():
        try:
            return list(itertools.islice(_copied(loader), count))
        finally:
            set_generator_states(loader, generators)


def _copied(loader: Iterable[Any]) -> Iterable[Any]:
    if isinstance(loader, Sequence):  # it has no position, and copying it would read all of it
        return loader
    try:
        copied = copy.copy(loader)
    except Exception:  # noqa: BLE001 - a loader that cannot be copied, for whatever reason
        return loader
    if isinstance(copied, DataLoader):
        vars(copied)["_iterator"] = None  # persistent workers serve one pass at a time
    if hasattr(copied, "set_epoch"):
        copied.set_epoch(0)  # gives it a position of its own
    return copied


class FirstBatches(ListLoader):
    """A loader of the first batches of another one, with a position and the other's attributes.

    The other loader is read at once.
    """

    def __init__(self, loader: Iterable[Any], count: int) -> None:
        super().__init__(first_batches(loader, count))
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in {"set_epoch", "sampler", "batch_sampler", "generator"}:
            raise AttributeError(name)
        return getattr(self._loader, name)
