"""Tensors of which each rank holds a share: the few operations that need to know it.

A model that `Trainer(shard=...)` has shared out holds `DTensor`s, cut along their first dimension.
What works element by element looks at `local_parts`; what sums over elements asks `norms`.
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
ROOT = "_diptych_root"
"""Under which a sharded model keeps its `ShardedRoot`, beside its parameters and parts."""


class ShardedRoot(nn.Module):
    """Holds a sharded model; what is in none of its units is whole for the length of a call.

    A task calls whatever it likes of a model, and the hooks that gather parameters belong to one
    `forward`: this one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Result]) -> Result:
        """Return what the call returns, with copies of what is a view of something else.

        What is written into a view would take the hooks of the backward pass away.
        """
        result = call()
        return map_leaves(result, _no_view) if torch.is_grad_enabled() else result


def _no_view(leaf: Any) -> Any:
    is_view = isinstance(leaf, Tensor) and leaf.requires_grad and leaf._is_view()  # noqa: SLF001
    return leaf.clone() if is_view else leaf


def is_sharded(tensor: Tensor) -> bool:
    """Say whether this rank holds a share of a tensor only."""
    return hasattr(tensor, "to_local")


def has_shards(model: nn.Module) -> bool:
    """Say whether a model is shared out over the ranks."""
    return ROOT in vars(model)


def call_on(
    function: Callable[[nn.Module, Value], Result], model: nn.Module, value: Value
) -> Result:
    """Return `function(model, value)`, for which a sharded model has what it needs at hand.

    Over the ranks of a sharded model it is collective: all of them call it, equally often.
    """
    root = vars(model).get(ROOT)
    return function(model, value) if root is None else root(lambda: function(model, value))


def mixed(model: nn.Module) -> AbstractContextManager[None]:
    """Let torch's operations on lists take sharded and whole tensors together."""
    if not has_shards(model):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication  # noqa: PLC0415

    return cast(AbstractContextManager[None], implicit_replication())


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, in the same memory; of a whole one, itself."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return `local_part` of each."""
    return [local_part(tensor) for tensor in tensors]


@torch.no_grad()
def norms(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the L2 norms of whole tensors, scalars, with one all-reduce for all that are sharded.

    Args:
        tensors: on one device.
        dtype: to compute in; None: their own.
    """
    parts = local_parts([tensor.detach() for tensor in tensors])
    found = list(torch._foreach_norm(parts, 2, dtype)) if parts else []  # noqa: SLF001
    places = [index for index, tensor in enumerate(tensors) if is_sharded(tensor)]
    if places:
        squares = torch.stack([found[index].double() for index in places]).square()
        dist.all_reduce(squares)
        for index, norm in zip(places, squares.sqrt().unbind(), strict=True):
            found[index] = norm.to(found[index].dtype)
    return found


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as a whole; of a sharded one all ranks ask together."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def whole_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state whose sharded tensors are whole, on rank 0's CPU; nothing on other ranks.

    One is gathered after another. All ranks call it. A state without shards comes back as it is.
    """
    if not any(is_sharded(value) for value in state.values()):
        return dict(state)
    found = {}
    for key, value in state.items():
        gathered = whole(value.detach())
        if rank() == 0:
            found[key] = gathered.cpu()
    return found


def shard_of(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the layout of another one, and on its device where that is sharded.

    Args:
        value: whole, or sharded over the same ranks, on any device.
        like: a tensor of the same shape, whole or sharded.
    """
    if not is_sharded(like) or value.shape != like.shape:
        return whole(value)
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - only who shards pays for it

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
    """Return the rows of a whole tensor that this rank holds when it is sharded."""
    size = -(-len(value) // world_size())
    return value[rank() * size : (rank() + 1) * size]
