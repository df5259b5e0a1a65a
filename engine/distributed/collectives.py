"""Collectives of a run: broadcasts of modules and buffers, sums."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
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


@waits_at("broadcasting the first rank's weights")
def broadcast_module(module: nn.Module) -> None:
    """Broadcast the parameters and buffers of a module from rank 0."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


@waits_at("broadcasting the model's buffers")
def broadcast_buffers(buffers: Iterable[Tensor]) -> None:
    """Broadcast buffers of a model from rank 0, with one collective for each of their types.

    Call it at the start of an update, not in a forward pass: both passes of a cached gradient must
    start from the same values.
    """
    if world_size() == 1:
        return
    by_type: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for buffer in buffers:
        by_type[buffer.dtype].append(buffer.detach())
    for alike in by_type.values():
        packed = torch.cat([buffer.reshape(-1) for buffer in alike])
        dist.broadcast(packed, src=0)
        parts = packed.split([buffer.numel() for buffer in alike])
        for buffer, part in zip(alike, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without a gradient; on one rank, the tensor."""
    if world_size() == 1:
        return value
    result = value.detach().clone()
    dist.all_reduce(result)
    return result


_host_groups: dict[str, Any] = {}


def maxima(*numbers: int) -> tuple[int, ...]:
    """Return the maxima of numbers over ranks, exchanged between hosts: no device is waited for."""
    if world_size() == 1:
        return numbers
    if _host_groups.get("world") is not dist.group.WORLD:  # it is collective, as this call is
        group = dist.new_group(backend="gloo", timeout=exchange_timeout())
        _host_groups.update(world=dist.group.WORLD, group=group)
    values = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_host_groups["group"])
    return tuple(values.tolist())


def exchange_device() -> torch.device:
    """Return a device whose tensors the process group accepts; the CPU without a group."""
    if world_size() > 1 and "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def exchange_timeout() -> timedelta | None:
    """Return the timeout of the default process group; None without one.

    For additional groups: torch gives them 30 minutes, whatever the default group has.
    """
    if world_size() == 1:
        return None
    world: Any = dist.group.WORLD
    backend = world._get_backend(exchange_device())  # noqa: SLF001 - torch has no public name
    timeout: timedelta = backend.options._timeout  # noqa: SLF001
    return timeout
