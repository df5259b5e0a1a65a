"""The optimizer's part of a run's state: its parameters by name, checked before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from diptych.engine.distributed.dtensor import shard_of
from diptych.engine.errors import CheckpointError
from diptych.engine.modules import named_parameters
from diptych.engine.state.run_parts import RunParts

STARTED_WITH_ZEROS: tuple[tuple[type[Optimizer], str, str], ...] = (
    (torch.optim.Adam, "amsgrad", "max_exp_avg_sq"),
    (torch.optim.RMSprop, "momentum", "momentum_buffer"),
    (torch.optim.RMSprop, "centered", "grad_avg"),
)
"""Optimizers of torch, an option, and the part of a parameter's state that they keep for it."""


def parameter_names(trainer: RunParts) -> list[list[str]]:
    """Return the names of the optimizer's parameters by group; "" if in neither module."""
    named = named_parameters(trainer.model, trainer.loss)
    names = {id(parameter): name for name, parameter in named.items()}
    groups = trainer.optimizer.param_groups
    return [[names.get(id(p), "") for p in group["params"]] for group in groups]


def sharded_as(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's saved state with tensors sharded as its parameters are."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        index: {
            key: shard_of(value, held[index])
            if isinstance(value, Tensor) and value.shape == held[index].shape
            else value
            for key, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": own}


def with_added_parts(
    optimizer: Optimizer, state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return an optimizer's saved state with the parts that an option of the script has added.

    A parameter that has a state already would never get them: torch makes all parts at once. The
    groups are the saved ones, with the options that the script has changed.
    """
    members = getattr(optimizer, "members", (optimizer,))
    owners = {id(group): member for member in members for group in member.param_groups}
    own = {index: dict(values) for index, values in state["state"].items()}
    for live, group in zip(optimizer.param_groups, groups, strict=True):
        added = [
            part
            for kind, option, part in STARTED_WITH_ZEROS
            if isinstance(owners[id(live)], kind) and group.get(option)
        ]
        for index, parameter in zip(group["params"], live["params"], strict=True):
            for part in added if own.get(index) else ():
                own[index].setdefault(part, torch.zeros_like(parameter.detach()))
    return {**state, "state": own, "param_groups": list(groups)}


def add_later_groups(trainer: RunParts, state: Mapping[str, Any], declared: int) -> None:
    """Add the parameter groups that the saved run added to its optimizer after it had started.

    The saved run started with `declared` groups.
    """
    optimizer, names = trainer.optimizer, state.get("parameters", [])
    named = named_parameters(trainer.model, trainer.loss)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if len(optimizer.param_groups) < declared:
        return
    for number in range(len(optimizer.param_groups), len(names)):
        members = [named[name] for name in names[number] if name in named]
        if len(members) < len(names[number]) or any(id(p) in held for p in members):
            return
        options = state["optimizer"]["param_groups"][number]
        optimizer.add_param_group({**options, "params": members})


def check_optimizer(trainer: RunParts, state: Mapping[str, Any]) -> None:
    """Check that a saved optimizer state fits: class, group sizes, order of parameters.

    The optimizer itself would notice a misfit too late, or not at all.

    Raises:
        CheckpointError: if it does not fit.
    """
    check_class(trainer.optimizer, state)
    groups = [
        [len(group["params"]) for group in held["param_groups"]]
        for held in (state["optimizer"], trainer.optimizer.state_dict())
    ]
    if groups[0] != groups[1]:
        raise CheckpointError(
            f"optimizer must have the checkpoint's groups, of {groups[0]} parameters, got "
            f"{groups[1]}. Build it as the saved run did; or start a new run from its weights with "
            "load_weights"
        )
    held = parameter_names(trainer)
    for number, (there, own) in enumerate(zip(state.get("parameters", held), held, strict=True)):
        _check_order(number, there, own)


def check_class(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Check that an optimizer is of the class that a saved state belongs to.

    Raises:
        CheckpointError: if it is not.
    """
    here, saved = type(optimizer).__name__, _saved_class(state)
    own, there = _members(optimizer), state["optimizer"].get("members")
    if own and there and own != there:
        here, saved = (f"CompositeOptimizer of {', '.join(names)}" for names in (own, there))
    if saved not in {None, here}:
        raise CheckpointError(
            f"optimizer must be the checkpoint's {saved}, got {here}. Use a {saved}; or start a "
            "new run from the checkpoint's weights with load_weights"
        )


def _members(optimizer: Optimizer) -> list[str]:
    return [type(member).__name__ for member in getattr(optimizer, "members", ())]


def _saved_class(state: Mapping[str, Any]) -> str | None:
    if "identity" in state:
        return str(state["identity"]["optimizer"]["class"]).rpartition(".")[2]
    held: str | None = state.get("fingerprint", {}).get("optimizer")  # of formats 1 and 2
    return held


def _check_order(number: int, there: Sequence[str], own: Sequence[str]) -> None:
    other = next((pair for pair in zip(there, own, strict=True) if pair[0] != pair[1]), None)
    if other is not None:
        raise CheckpointError(
            "optimizer must hold its parameters in the checkpoint's order: in group "
            f"{number} the checkpoint has {other[0]}, got {other[1]}. Build the optimizer with "
            "its parameters in the order of the saved run"
        )
