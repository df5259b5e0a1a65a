"""The optional members of a loader, and their defaults.

A loader is an iterable of batches. These functions are the only code that asks what else it has: a
length, a position (`state_dict`, `load_state_dict`), `set_epoch` (its own or its sampler's), random
generators. They look attributes up one by one, so that a wrapper may pass them on with
`__getattr__`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

SAMPLERS: set[type] = {
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
}
"""Samplers whose order depends on the generators' states, and on the epoch, alone."""


def check_is_loader(name: str, data: object) -> None:
    """Check that an argument can be a loader: an iterable of batches, not one batch.

    Raises:
        TypeError: if it cannot.
    """
    way_out = "Pass a loader: SeededLoader(dataset, batch_size=...)"
    if isinstance(data, (Mapping, Tensor)):
        way_out = f"For a single batch pass a list: [{name}]"
    elif isinstance(data, Iterable):
        return
    got = type(data).__name__
    raise TypeError(f"{name} must be an iterable of batches, got a {got}. {way_out}")


class PositionedLoader(Protocol):
    """A loader that can save its position and continue from one, as torchdata's loaders can."""

    def __iter__(self) -> Iterator[Any]:
        """Start or continue a pass."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch."""

    def load_state_dict(self, state_dict: Any, /) -> object:
        """Go to a position; the next iterator begins with the batch after it."""


class Pass:
    """One pass over a loader with a position of its own, whoever else reads that loader.

    The position is a function that returns a state for the loader's `load_state_dict`.
    """

    def __init__(self, batches: Iterator[Any], position: Callable[[], dict[str, Any]]) -> None:
        self._batches, self.position = batches, position

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> Any:
        return next(self._batches)


class ListLoader:
    """A list of batches as a loader with a position: the number of batches of the pass so far."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches
        self._done = self._start = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        self._done, self._start = self._start, 0
        while self._done < len(self._batches):
            self._done += 1
            yield self._batches[self._done - 1]

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to a position."""
        self._done = self._start = state_dict["done"]


def with_position(loader: Any) -> Any:
    """Return a list, tuple or range of batches as a loader with a position, else the loader."""
    # No subclasses: they may iterate in another order, or have set_epoch.
    return ListLoader(loader) if type(loader) in {list, tuple, range} else loader


def has_position(loader: object) -> TypeGuard[PositionedLoader]:
    """Say whether a loader can save its position and continue from one."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def repeats_its_order(loader: object) -> bool:
    """Say whether a pass over a loader can be read again from the generators' states at its start.

    A torch loader over a data set with indices can, with torch's own samplers.
    """
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return False
    own_batches = loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    return own_batches and type(loader.sampler) in SAMPLERS


def position_getter(batches: object, loader: PositionedLoader) -> Callable[[], dict[str, Any]]:
    """Return the function that gives the position of an iterator over a loader."""
    return batches.position if isinstance(batches, Pass) else loader.state_dict


def length_of(loader: object) -> int | None:
    """Return the number of batches of one pass; None if the loader does not know."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an iterable data set has __len__ and no length
        return None


def set_epoch(loader: object, epoch: int) -> None:
    """Pass the number of the next epoch, from 0, to a loader or its sampler.

    Without it a distributed sampler repeats one order in every epoch.
    """
    owner = _epoch_aware(loader)
    if owner is not None:
        owner.set_epoch(epoch)


def takes_epoch(loader: object) -> bool:
    """Say whether a loader, or its sampler, has `set_epoch`."""
    return _epoch_aware(loader) is not None


def _epoch_aware(loader: object) -> Any:
    """Return the object with `set_epoch`: the loader, its sampler, or None."""
    owners = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    return next((owner for owner in owners if hasattr(owner, "set_epoch")), None)


def generator_states(loader: object) -> list[torch.Tensor]:
    """Return the states of the random generators that a loader or its sampler owns."""
    return [*map(torch.Generator.get_state, _generators(loader))]


def set_generator_states(loader: object, states: Sequence[torch.Tensor]) -> None:
    """Restore what `generator_states` returned."""
    for generator, state in zip(_generators(loader), states, strict=False):
        generator.set_state(state)


def _generators(loader: object) -> list[torch.Generator]:
    sampler = getattr(loader, "sampler", None)
    found = getattr(loader, "generator", None), getattr(sampler, "generator", None)
    if found == (None, None):  # before each batch: torch's isinstance is slow
        return []
    return [generator for generator in found if isinstance(generator, torch.Generator)]
