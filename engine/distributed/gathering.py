"""Gathering of small values and of rows from all ranks."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from diptych.engine.distributed.collectives import world_size

T = TypeVar("T")


def gather_values(value: T) -> list[T]:
    """Return the values of all ranks, by rank; without a process group, only this one's.

    A value is a small object that can be pickled.
    """
    if world_size() == 1:
        return [value]
    received = [value] * world_size()
    dist.all_gather_object(received, value)
    return received


def gather_rows(local: Tensor, device: torch.device | None = None) -> Tensor:
    """Return the rows of all ranks, by rank, on every rank; ranks may differ in their number.

    Args:
        local: this rank's rows [n, ...]. If n is 0, the other dimensions do not matter.
        device: where to gather; a rank without rows must pass it. None: the device of `local`.
    """
    if world_size() == 1:
        return local
    shapes = gather_values(tuple(local.shape))
    rest = next((shape[1:] for shape in shapes if shape[0]), None)
    if rest is None:
        return local
    padded = local.new_zeros(max(shape[0] for shape in shapes), *rest, device=device)
    if len(local):
        padded[: len(local)] = local
    received = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(received, padded)
    return torch.cat([part[: shape[0]] for part, shape in zip(received, shapes, strict=True)])
