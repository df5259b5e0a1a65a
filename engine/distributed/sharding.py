"""Shares a model out over the ranks, unit by unit, with torch's `fully_shard` (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.engine.distributed.dtensor import ROOT, ShardedRoot, has_shards
from diptych.engine.distributed.sharding_units import Place, find_units, places_of_units
from diptych.engine.modules import unwrapped
from diptych.engine.settings import Units

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NEEDED = (2, 9)
"""The oldest version of torch that this was seen to be right with: 2.7 adds up over gloo's ranks
where it should average."""


def shard_model(
    model: nn.Module, loss: nn.Module, optimizer: Optimizer, shard: Units, device: torch.device
) -> None:
    """Share a model out in place, with rank 0's values; the optimizer then holds the shares.

    Each unit goes to the device by itself, whole, and leaves its share there. What has no
    dimension, and what the loss holds too, stays whole on every rank. A model that is shared out
    already stays as it is.

    Args:
        model: on the CPU, or anywhere.
        loss: what it holds of the model stays whole.
        optimizer: new, of the model's parameters.
        shard: see `find_units`.
        device: where the shares go.

    Raises:
        RuntimeError: if torch is too old.
        ValueError: if a pattern names no unit, a parameter belongs to two units, or the optimizer
            has made updates already.
    """
    if has_shards(model):
        return
    _check_torch()
    _check_new(optimizer, model)
    units = find_units(model, shard)
    places = places_of_units(model, units)
    left = set(_left_whole(model, loss))
    _take_values_of_rank_zero(_left_whole(model, loss), device)
    root, bare, mesh = ShardedRoot(model), unwrapped(model), _all_ranks(device)
    for path in [*reversed(units), ""]:
        own = [place for place in places[path] if place[2] not in left]
        _take_values_of_rank_zero(dict.fromkeys(p for _, _, p in own), device)
        _share_out(bare.get_submodule(path) if path else root, left, mesh)
        _renew(optimizer, own)
    for buffer in model.buffers():
        dist.broadcast(buffer.detach(), src=0)
    for module in (model, bare):  # not as a part of them
        vars(module)[ROOT] = root


def _left_whole(model: nn.Module, loss: nn.Module) -> list[nn.Parameter]:
    of_loss = {id(parameter) for parameter in loss.parameters()}
    return [p for p in model.parameters() if p.ndim == 0 or id(p) in of_loss]


def _all_ranks(device: torch.device) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - only who shards

    return init_device_mesh(device.type, (dist.get_world_size(),))


def _share_out(unit: nn.Module, left: set[nn.Parameter], mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - pays for the import

    # Resharded after the forward pass, the root too: whoever looks at a parameter between two
    # passes finds the share, never a copy that is about to go.
    fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=left)


def _renew(optimizer: Optimizer, places: Sequence[Place]) -> None:
    """Put the new parameters in the optimizer, in place of the old ones, which keep no memory."""
    renewed = {id(parameter): getattr(module, name) for module, name, parameter in places}
    for group in optimizer.param_groups:
        group["params"] = [renewed.get(id(parameter), parameter) for parameter in group["params"]]
    for _, _, parameter in places:
        parameter.data = parameter.data.new_empty(0)


def _take_values_of_rank_zero(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    for parameter in parameters:
        value: Tensor = parameter.detach().to(device).contiguous()  # as a shard has to be
        dist.broadcast(value, src=0)
        parameter.data = value


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < NEEDED:
        raise RuntimeError(
            f"shard needs torch >= {'.'.join(map(str, NEEDED))}, got {torch.__version__}"
        )


def _check_new(optimizer: Optimizer, model: nn.Module) -> None:
    if any(parameter in optimizer.state for parameter in model.parameters()):
        raise ValueError(
            "the optimizer of a model that is sharded must be new, got one with a state: build it "
            "anew, and resume a run from its checkpoint"
        )
