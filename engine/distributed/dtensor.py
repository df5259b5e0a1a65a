"""Operations on sharded tensors (DTensors), of which each rank holds a shard.

A model that `Trainer(shard=...)` has sharded holds `DTensor`s, cut along their first dimension. For
elementwise operations use `local_parts`; for sums over elements, `norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.engine.containers import map_leaves
from diptych.engine.distributed.collectives import rank, world_size

Value = TypeVar("Value")
Result = TypeVar("Result")
WHOLE = frozenset({Tensor, nn.Parameter})
"""Types of tensors that are not sharded."""
NOTHING = nullcontext()

ROOT = "_diptych_root"
"""The key in `vars(model)` of the `ShardedRoot` of a sharded model."""


class ShardedRoot(nn.Module):
    """The FSDP root of a sharded model; parameters outside of its units are whole during a call.

    A task may call any method of a model, but the hooks that gather parameters need one `forward`:
    this one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Result]) -> Result:
        """Return the result of the call, with copies instead of views.

        FSDP's hooks for the backward pass would be lost if someone wrote into a view.
        """
        result = call()
        return map_leaves(result, _without_views) if torch.is_grad_enabled() else result


def _without_views(leaf: Any) -> Any:
    is_view = isinstance(leaf, Tensor) and leaf.requires_grad and leaf._is_view()  # noqa: SLF001
    return leaf.clone() if is_view else leaf


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, of which this rank holds a shard."""
    return hasattr(tensor, "to_local")


def has_shards(model: nn.Module) -> bool:
    """Say whether a model is sharded over the ranks."""
    return ROOT in vars(model)


def call_on(
    function: Callable[[nn.Module, Value], Result], model: nn.Module, value: Value
) -> Result:
    """Return `function(model, value)`; a sharded model gathers its parameters for the call.

    For a sharded model this is collective: all ranks must call it equally often.
    """
    root = vars(model).get(ROOT)
    return function(model, value) if root is None else root(lambda: function(model, value))


def mixed_tensors_allowed(model: nn.Module) -> AbstractContextManager[None]:
    """Allow sharded and whole tensors in one list for torch's operations on lists."""
    if not has_shards(model):
        return NOTHING
    from torch.distributed.tensor.experimental import implicit_replication  # noqa: PLC0415

    return cast(AbstractContextManager[None], implicit_replication())


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, in the same memory; of a whole tensor, itself."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the `local_part` of each tensor."""
    if WHOLE.issuperset(map(type, tensors)):  # one test for all of them
        return list(tensors)
    return [local_part(tensor) for tensor in tensors]


@torch.no_grad()
def norms(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the global L2 norms of tensors, scalars, with one all-reduce for all sharded ones.

    Args:
        tensors: on one device.
        dtype: the type to compute in; None: that of the tensors.
    """
    parts = local_parts(tensors)
    found = list(torch._foreach_norm(parts, 2, dtype)) if parts else []  # noqa: SLF001
    sharded = [n for n, (part, of) in enumerate(zip(parts, tensors, strict=True)) if part is not of]
    if sharded:
        squares = torch.stack([found[index].double() for index in sharded]).square()
        dist.all_reduce(squares)
        for index, norm in zip(sharded, squares.sqrt().unbind(), strict=True):
            found[index] = norm.to(found[index].dtype)
    return found


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a whole tensor; for a sharded one this is collective."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def full_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of whole tensors, on rank 0's CPU; an empty one on other ranks.

    Collective: tensors are gathered one at a time. A state without shards is returned as it is.
    """
    if not any(is_sharded(value) for value in state.values()):
        return dict(state)
    found = {}
    for key, value in state.items():
        gathered = full_tensor(value.detach())
        if rank() == 0:
            found[key] = gathered.cpu()
    return found


def shard_of(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the layout of another one, and on its device if that is sharded.

    Args:
        value: whole, or sharded over the same ranks, on any device.
        like: a tensor of the same shape, whole or sharded.
    """
    if not is_sharded(like) or value.shape != like.shape:
        return full_tensor(value)
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - a slow import

    layout = cast(Any, like)
    part = local_part(value) if is_sharded(value) else own_rows(value)
    return DTensor.from_local(
        part.to(like.device),
        layout.device_mesh,
        layout.placements,
        shape=like.shape,
        stride=like.stride(),
    )


def own_rows(value: Tensor) -> Tensor:
    """Return the rows of a whole tensor that would be this rank's shard."""
    size = -(-len(value) // world_size())
    return value[rank() * size : (rank() + 1) * size]
