"""What a run needs of a process group: equal modules and buffers, sums, agreement."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.engine.distributed.hang_report import waits_at


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@waits_at("giving every rank the first rank's weights")
def same_on_all_ranks(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers of a module."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


@waits_at("sharing the model's buffers")
def share_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers, with one broadcast for each type that they have.

    Once at the beginning of an update, not in a forward pass: both passes of a cached gradient must
    start from the same values.
    """
    if world_size() == 1:
        return
    by_type: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for buffer in model.buffers():
        by_type[buffer.dtype].append(buffer.detach())
    for buffers in by_type.values():
        packed = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.broadcast(packed, src=0)
        parts = packed.split([buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without a gradient; alone, the tensor itself."""
    if world_size() == 1:
        return value
    result = value.detach().clone()
    dist.all_reduce(result)
    return result


def check_same_on_all_ranks(what: str, words: Sequence[str]) -> None:
    """Check that all ranks hold the same words in the same order, which what follows relies on.

    Raises:
        RuntimeError: on all ranks, if they do not, naming this rank's.
    """
    if world_size() == 1:
        return
    digest = float(zlib.crc32("\n".join(words).encode()))
    extremes = torch.tensor([digest, -digest], dtype=torch.float64, device=exchange_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    highest, lowest = extremes.tolist()
    if highest != -lowest:
        raise RuntimeError(
            f"{what} must be the same on all ranks, in the same order, got "
            f"{', '.join(words) or 'none'} on rank {rank()} and others elsewhere"
        )


def exchange_device() -> torch.device:
    """Return a device whose tensors the process group takes; the CPU without one."""
    if world_size() > 1 and "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def exchange_timeout() -> timedelta | None:
    """Return how long the ranks wait for one another, None without a process group.

    For groups beside the default one: torch gives them 30 minutes, whatever the default group has.
    """
    if world_size() == 1:
        return None
    world: Any = dist.group.WORLD
    backend = world._get_backend(exchange_device())  # noqa: SLF001 - torch has no public name
    timeout: timedelta = backend.options._timeout  # noqa: SLF001
    return timeout
