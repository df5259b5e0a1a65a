"""The sharding of a model over the ranks, unit by unit, with torch's `fully_shard` (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.engine.distributed.dtensor import ROOT, ShardedRoot, has_shards
from diptych.engine.distributed.sharding_units import ParameterSlot, find_units, slots_by_unit
from diptych.engine.modules import unwrapped
from diptych.engine.settings import Units

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NEEDED = (2, 9)
"""The oldest version of torch with correct gradients: over gloo, 2.7 sums instead of averaging."""


def shard_model(
    model: nn.Module, loss: nn.Module, optimizer: Optimizer, shard: Units, device: torch.device
) -> None:
    """Shard a model in place, with rank 0's values; the optimizer then holds the shards.

    The units are moved to the device and sharded one at a time, so that the device never holds the
    whole model. Parameters without a dimension, and those that the loss holds too, stay whole on
    every rank. A model that is sharded already is not changed. The model may be on any device. The
    parameters of the loss stay whole. See `find_units` for `shard`.

    Raises:
        RuntimeError: if torch is too old.
        ValueError: if a pattern matches no unit, a parameter belongs to two units, or the optimizer
            has made updates.
    """
    if has_shards(model):
        return
    _check_torch()
    _check_new(optimizer, model)
    units = find_units(model, shard)
    slots = slots_by_unit(model, units)
    whole = dict.fromkeys(_kept_whole(model, loss))
    _move_from_rank_zero(whole, device)
    root, bare, mesh = ShardedRoot(model), unwrapped(model), _all_ranks(device)
    for path in [*reversed(units), ""]:
        own = [slot for slot in slots[path] if slot[2] not in whole]
        _move_from_rank_zero(dict.fromkeys(p for _, _, p in own), device)
        _shard_unit(bare.get_submodule(path) if path else root, set(whole), mesh)
        _replace_parameters(optimizer, own)
    for buffer in model.buffers():
        dist.broadcast(buffer.detach(), src=0)
    for module in (model, bare):  # not as a submodule
        vars(module)[ROOT] = root


def _kept_whole(model: nn.Module, loss: nn.Module) -> list[nn.Parameter]:
    of_loss = {id(parameter) for parameter in loss.parameters()}
    return [p for p in model.parameters() if p.ndim == 0 or id(p) in of_loss]


def _all_ranks(device: torch.device) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - a slow import

    return init_device_mesh(device.type, (dist.get_world_size(),))


def _shard_unit(unit: nn.Module, whole: set[nn.Parameter], mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - a slow import

    # Reshard after the forward pass, the root too: code that reads a parameter between two passes
    # finds the shard, never a gathered copy that is freed later.
    fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def _replace_parameters(optimizer: Optimizer, slots: Sequence[ParameterSlot]) -> None:
    """Replace the parameters in the optimizer by the sharded ones; free the memory of the old."""
    renewed = {id(parameter): getattr(module, name) for module, name, parameter in slots}
    for group in optimizer.param_groups:
        group["params"] = [renewed.get(id(parameter), parameter) for parameter in group["params"]]
    for _, _, parameter in slots:
        parameter.data = parameter.data.new_empty(0)


def _move_from_rank_zero(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    for parameter in parameters:
        value: Tensor = parameter.detach().to(device).contiguous()  # shards must be
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
            "optimizer must be new if shard is set, got one with a state. Build a new one; to "
            "continue a run, resume it from its checkpoint."
        )
