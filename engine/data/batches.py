"""What moves, cuts and joins batches, whatever containers they are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.engine.checks import is_whole
from diptych.engine.containers import leaves, map_leaves
from diptych.engine.data.batch_source import Pass
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.errors import BatchError


def to_device(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor on `device`; a copy from pinned memory does not wait.

    Args:
        batch: tensors in any nesting of mappings, tuples, lists, named tuples, attrs and data
            classes.
        device: where the tensors go.
    """

    def move(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    return map_leaves(batch, move)


def batch_size(batch: Any) -> int:
    """Return the number of samples: the first dimension of the first tensor that has one.

    Raises:
        BatchError: if no leaf is a tensor with a dimension, or a list.
    """
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise BatchError(
        "a batch must hold a tensor whose first dimension is the sample, "
        f"got {type(batch).__name__}"
    )


def split(batch: Any, size: int) -> list[Any]:
    """Cut `batch` into as few pieces of at most `size` samples as it takes, in order.

    The pieces differ by one sample at the most, so that none is too small for a batch norm.
    Tensors, arrays and lists as long as the batch are cut; other leaves (a temperature, a name) go
    into every piece. A list of tensors is a container of columns, not of samples.

    Args:
        batch: tensors [B, ...] in any nesting.
        size: samples of a piece, >= 1.
    """
    return cut(batch, -(-batch_size(batch) // size))


def cut(batch: Any, pieces: int) -> list[Any]:
    """Cut `batch` into so many pieces, as `split` does.

    Args:
        batch: tensors [B, ...] in any nesting.
        pieces: their number, >= 1.
    """
    samples = batch_size(batch)
    bounds = [samples * index // pieces for index in range(pieces + 1)]
    return [part(batch, start, stop) for start, stop in pairwise(bounds)]


def part(batch: Any, start: int, stop: int) -> Any:
    """Return the samples from `start` to `stop` of a batch; see `split` for what is a sample."""
    samples = batch_size(batch)

    def take(leaf: Any) -> Any:
        columns = (Tensor, np.ndarray)
        per_sample = isinstance(leaf, columns) and leaf.ndim and leaf.shape[0] == samples
        listed = isinstance(leaf, (list, tuple)) and len(leaf) == samples
        return leaf[start:stop] if per_sample or listed else leaf

    return map_leaves(batch, take)


def of_this_rank(batches: Sequence[Any]) -> list[Any]:
    """Return this rank's part of each batch, so that several ranks share an evaluation.

    Every rank gets as many batches as there are; alone, they stay whole. The parts of a batch
    differ by one sample at the most.

    Args:
        batches: the same on all ranks, each of at least as many samples as there are ranks.

    Raises:
        BatchError: if a batch has fewer samples than there are ranks.
    """
    ranks = world_size()
    sizes = [batch_size(batch) for batch in batches]
    if min(sizes, default=ranks) < ranks:
        raise BatchError(
            f"a batch must have a sample for each of {ranks} ranks, got one of {min(sizes)}"
        )
    return [
        part(batch, size * rank() // ranks, size * (rank() + 1) // ranks)
        for batch, size in zip(batches, sizes, strict=True)
    ]


def join(batches: Sequence[Any]) -> Any:
    """Concatenate batches of one structure along their first dimension: the opposite of `split`.

    Raises:
        BatchError: if the batches differ in structure.
    """
    columns = [leaves(batch) for batch in batches]
    if len({len(column) for column in columns}) != 1:
        raise BatchError(
            f"batches of one group must have one structure, got {[len(c) for c in columns]} leaves"
        )
    joined = iter([_join_leaves(values) for values in zip(*columns, strict=True)])
    return map_leaves(batches[0], lambda _: next(joined))


def _join_leaves(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(list(values))
    if isinstance(first, np.ndarray) and first.ndim:
        return np.concatenate(list(values))
    if isinstance(first, (list, tuple)):
        return type(first)(item for value in values for item in value)
    return first


_OF_THE_LOADER = ("set_epoch", "generator", "sampler", "batch_sampler")


class _Groups:
    """Iterates a loader, joining several of its batches into one."""

    def __init__(self, loader: Any, count: int) -> None:
        self._loader, self._count = loader, count
        self._position: Callable[[], dict[str, Any]] | None = None

    def __len__(self) -> int:
        if not isinstance(self._loader, Sized):
            raise TypeError(f"{type(self._loader).__name__} has no length")
        return math.ceil(len(self._loader) / self._count)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        if not _has_positions(self._loader):
            return self._read(batches)
        # A group that could not be read as a whole begins anew; between two groups the position of
        # the pass over the loader is the group's.
        of_loader = batches.position if isinstance(batches, Pass) else self._loader.state_dict
        started: list[dict[str, Any]] = []
        self._position = partial(_first_or, started, of_loader)
        return Pass(self._read(batches, of_loader, started), self._position)

    def _read(
        self,
        batches: Iterator[Any],
        position: Callable[[], dict[str, Any]] = dict,
        started: list[dict[str, Any]] | None = None,
    ) -> Iterator[Any]:
        started = [] if started is None else started
        while True:
            started.append(position())
            group = list(itertools.islice(batches, self._count))
            started.clear()
            if not group:
                return
            yield join(group)

    def __getattr__(self, name: str) -> Any:
        # Groups have a position, an epoch and generators where the loader has them.
        if name == "state_dict" and _has_positions(self._loader):
            return self._position or self._loader.state_dict
        if name == "load_state_dict" and _has_positions(self._loader):
            return self._go_to
        if name in _OF_THE_LOADER:
            return getattr(self._loader, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _go_to(self, position: Mapping[str, Any]) -> None:
        self._position = None
        self._loader.load_state_dict(position)


def _has_positions(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _first_or(
    started: Sequence[dict[str, Any]], position: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    return dict(started[0] if started else position())


def in_groups(loader: Iterable[Any], count: int) -> _Groups:
    """Group `count` batches of a loader into one, so that one update sees them all.

    The last group of an epoch holds what is left. Together with `microbatch_size`, a loader of
    small batches gives the update of a large one.

    Args:
        loader: gives batches of one structure.
        count: batches of a group, >= 1.

    Raises:
        ValueError: if `count` is no whole number of at least 1.
    """
    if not is_whole(count):
        raise ValueError(f"count must be a whole number of batches >= 1, got {count!r}")
    return _Groups(loader, count)
