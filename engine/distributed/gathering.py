"""Rows of every rank in one tensor, from shards of any size."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from diptych.engine.distributed.collectives import world_size

T = TypeVar("T")


def from_all_ranks(value: T) -> list[T]:
    """Return a small value of every rank, in their order; alone, this one's."""
    if world_size() == 1:
        return [value]
    received = [value] * world_size()
    dist.all_gather_object(received, value)
    return received


def rows_of_all_ranks(local: Tensor, device: torch.device | None = None) -> Tensor:
    """Return the rows of all ranks, in the order of ranks, on every rank.

    Args:
        local: this rank's rows [n, ...]; without rows, of any other dimensions.
        device: where a rank without rows takes part; None: where `local` is.
    """
    if world_size() == 1:
        return local
    shapes = from_all_ranks(tuple(local.shape))
    rest = next((shape[1:] for shape in shapes if shape[0]), shapes[0][1:])
    padded = local.new_zeros(max(shape[0] for shape in shapes), *rest, device=device)
    if len(local):
        padded[: len(local)] = local
    received = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(received, padded)
    return torch.cat([part[: shape[0]] for part, shape in zip(received, shapes, strict=True)])
