"""Operations on whole batches of any containers: move, count, cut, join, share out over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.engine.containers import leaves, map_leaves
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.errors import BatchError


def to_device(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor on `device`; a copy from pinned memory does not wait.

    Args:
        batch: tensors in any nesting of mappings, tuples, lists, named tuples, attrs classes and
            data classes.
        device: the device of the result.
    """

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.device == device:  # a test costs less than `to`
            return leaf
        return leaf.to(device, non_blocking=True)

    return map_leaves(batch, move)


def batch_size(batch: Any) -> int:
    """Return the number of samples: the first dimension of the first tensor that has one.

    Raises:
        BatchError: if no leaf is a tensor with a dimension.
    """
    if type(batch) in {tuple, list, dict} and batch:  # spares most batches the whole walk
        first = next(iter(batch.values() if type(batch) is dict else batch))
        if type(first) is Tensor and first.ndim:
            return first.shape[0]
    found = leaves(batch)
    for leaf in found:
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    kinds = ", ".join({type(leaf).__name__: None for leaf in found})
    raise BatchError(
        "a batch must hold a tensor whose first dimension is the sample, got "
        f"{type(batch).__name__} of [{kinds}]. NumPy arrays become tensors by "
        "torch.from_numpy, or in a loader that collates; a path or a text is no loader"
    )


def batch_kind(batch: Any) -> int:
    """Return a number that is equal in this process for batches of equal structure.

    The structure is the keys, and the leaves' types and numbers of dimensions, not their sizes.
    """
    kinds = [
        (leaf.ndim, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)
        for leaf in leaves(batch)
    ]
    return hash((tuple(batch) if isinstance(batch, Mapping) else (), *kinds))


def split_batch(batch: Any, size: int) -> list[Any]:
    """Cut `batch` into as few pieces of at most `size` samples as possible, in order.

    The pieces differ by at most one sample, so that none is too small for a batch norm. Tensors,
    arrays and lists as long as the batch are cut; other leaves (a temperature, a name) go into
    every piece. A list of tensors is a container of columns, not of samples.

    Args:
        batch: tensors [B, ...] in any nesting.
        size: samples of a piece, >= 1.
    """
    return cut_batch(batch, -(-batch_size(batch) // size))


def cut_batch(batch: Any, pieces: int) -> list[Any]:
    """Cut `batch` into a number of pieces, by the rules of `split_batch`."""
    samples = batch_size(batch)
    bounds = [samples * index // pieces for index in range(pieces + 1)]
    return [batch_slice(batch, start, stop) for start, stop in pairwise(bounds)]


def batch_slice(batch: Any, start: int, stop: int) -> Any:
    """Return the samples from `start` to `stop` of a batch, by the rules of `split_batch`."""
    samples = batch_size(batch)

    def take(leaf: Any) -> Any:
        columns = (Tensor, np.ndarray)
        per_sample = isinstance(leaf, columns) and leaf.ndim and leaf.shape[0] == samples
        listed = isinstance(leaf, (list, tuple)) and len(leaf) == samples
        return leaf[start:stop] if per_sample or listed else leaf

    return map_leaves(batch, take)


def of_this_rank(batches: Sequence[Any]) -> list[Any]:
    """Return this rank's part of each batch, so that several ranks share an evaluation.

    Every rank gets the same number of batches; the parts of one batch differ by at most one sample.
    Without a process group, the batches stay whole.

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
        batch_slice(batch, size * rank() // ranks, size * (rank() + 1) // ranks)
        for batch, size in zip(batches, sizes, strict=True)
    ]


def join_batches(batches: Sequence[Any]) -> Any:
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
