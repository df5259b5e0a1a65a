"""What the step needs of a process group: replicas, averaged gradients, sums over ranks."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def replicated(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model in torch's data-parallel wrapper.

    Alone, or with nothing to train, that is the model itself.

    Args:
        model: on `device`; its parameters and buffers become those of rank 0 on every rank.
        device: this rank's.
    """
    if world_size() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    # `share_buffers` does it, once an update. Newer torch has another word for it.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    word = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings: dict[str, Any] = {word: False}
    if device.type == "cuda":
        settings["device_ids"] = [device]
    return DistributedDataParallel(model, **settings)


def without_sync(model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes a context in which backward passes leave gradients on their rank."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync
    return nullcontext


def same_on_all_ranks(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers of a module that no wrapper keeps equal."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def share_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers, with one broadcast for each type that they have.

    Once at the beginning of an update: a wrapper that does it in some of the forward passes would
    do it between the two passes of a cached gradient, which must start from the same values.
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


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that no wrapper averages; a missing one counts as 0."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            parameter.grad = gradient.div_(world_size())


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, without a gradient; alone, the tensor itself."""
    if world_size() == 1:
        return value
    result = value.detach().clone()
    dist.all_reduce(result)
    return result
