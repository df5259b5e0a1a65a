"""The values that script and progress both own: rates, modes and attributes, then and now."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.engine.data.batches import to_device
from diptych.engine.errors import CheckpointError
from diptych.engine.modules import named_parameters
from diptych.engine.name_patterns import listed
from diptych.engine.state.description import class_name, tensor_digest
from diptych.engine.state.plain_state import plain_state
from diptych.engine.state.references import scaled_rate
from diptych.engine.state.run_identity import (
    RunIdentity,
    added_to_state,
    held_of,
    held_settings,
    lost_memory,
    module_settings,
    modules_of,
    replaced_parts,
    requires_grad_of,
    tensors_of,
)
from diptych.engine.state.run_parts import RunParts

logger = logging.getLogger(__name__)

RATES = ("lr", "initial_lr")
ABSENT = object()


def current_values(trainer: RunParts, declared: RunIdentity) -> dict[str, Any]:
    """Return the modes and module attributes that are no longer as declared.

    Returns:
        `requires_grad` by parameter, `training` by module, `attributes` by module and name, `held`
        and `tensors` by name, and `state`, what handlers and functions have added to
        `trainer.state`. And what a checkpoint cannot hold: `parts`, the descriptions of a task,
        transform or step in place of the declared one, and `memory`, of handlers without a state.
    """
    values = declared.values
    there = values["modules"]
    resting = {id(part) for part in trainer.resting_parts}
    modes = {path: id(part) not in resting for path, part in modules_of(trainer).items()}
    attributes = {
        path: {k: v for k, v in module_settings(part).items() if there[path].get(k, ABSENT) != v}
        for path, part in modules_of(trainer).items()
        if path in there
    }
    held = held_of(trainer)
    return {
        "requires_grad": _changed(requires_grad_of(trainer), values["requires_grad"]),
        "training": _changed(modes, values["training"]),
        "attributes": {path: found for path, found in attributes.items() if found},
        "held": {
            name: plain_state(held[name])
            for name, value in held_settings(held).items()
            if declared.declared("held", name) != value
        },
        "tensors": {
            name: tensor.detach()
            for name, tensor in tensors_of(trainer).items()
            if declared.declared("tensors", name) != tensor_digest(tensor)
        },
        "parts": replaced_parts(trainer, declared),
        "memory": lost_memory(trainer, declared),
        "state": dict(_plain_only(added_to_state(trainer))),
    }


def _plain_only(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        with suppress(CheckpointError):  # a checkpoint cannot hold it
            yield name, plain_state(value, name)


def _changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in now.items() if before.get(name, value) != value}


def restore_current(
    trainer: RunParts, current: Mapping[str, Any], saved: RunIdentity, here: RunIdentity
) -> None:
    """Give modes and attributes their saved values where the script declares the same as then."""
    named = named_parameters(trainer.model, trainer.loss)
    for name, trainable in _wanted("requires_grad", current, saved, here).items():
        if name in named and named[name].requires_grad != trainable:
            named[name].requires_grad_(trainable)
    modules = modules_of(trainer)
    for path, training in _wanted("training", current, saved, here).items():
        if path in modules:
            modules[path].training = training
    _restore_attributes(modules, current["attributes"], saved, here)
    _restore_held(trainer, modules, current, saved, here)
    _report_parts(trainer, current.get("parts", {}), here)
    _report_memory(current.get("memory", {}), here)
    there, own = (one.values.get("state", {}) for one in (saved, here))
    added = current.get("state", {}).items()
    _add_to_state(trainer, {k: value for k, value in added if there.get(k) == own.get(k)})


def _restore_held(
    trainer: RunParts,
    modules: Mapping[str, nn.Module],
    current: Mapping[str, Any],
    saved: RunIdentity,
    here: RunIdentity,
) -> None:
    for section in ("held", "tensors"):
        for name, value in current.get(section, {}).items():
            path, _, attribute = name.rpartition(".")
            same = saved.declared(section, name) == here.declared(section, name)
            if path in modules and same:
                _put(modules[path], attribute, to_device(value, trainer.device))


def _restore_attributes(
    modules: Mapping[str, nn.Module],
    attributes: Mapping[str, Mapping[str, Any]],
    saved: RunIdentity,
    here: RunIdentity,
) -> None:
    for path, found in attributes.items():
        there, own = (one.values["modules"].get(path, {}) for one in (saved, here))
        kind = found.get("class", there.get("class"))
        if path in modules and _class_of(modules[path]) == kind:  # no other has taken its place
            _set_attributes(modules[path], found, there, own)
        elif path in modules and "class" in found:
            logger.warning(
                "%s was a %s when the run was saved, in place of the script's %s, which is used.",
                *(path, kind, _class_of(modules[path])),
            )


def _put(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute; others may hold the same list, dictionary or tensor, which is kept."""
    now = getattr(module, name, None)
    if isinstance(now, list) and isinstance(value, list):
        now[:] = value
    elif isinstance(now, dict) and isinstance(value, dict):
        now.clear()
        now.update(value)
    elif isinstance(now, Tensor) and isinstance(value, Tensor) and now.shape == value.shape:
        now.detach().copy_(value)
    else:
        setattr(module, name, value)


def _report_parts(trainer: RunParts, parts: Mapping[str, Any], here: RunIdentity) -> None:
    """Log the parts that were others when the run was saved, if no handler has restored them."""
    now = {**here.values, **replaced_parts(trainer, here)}
    for name, part in parts.items():
        if now[name] != part:
            logger.warning(
                "The %s was changed during the saved run, which a checkpoint cannot hold: the "
                "script's is used. Change it in a handler with a state, or in a stage.",
                name,
            )


def _report_memory(memory: Mapping[str, Any], here: RunIdentity) -> None:
    """Log what handlers without a state, and functions, kept when the run was saved."""
    lost = []
    for name, value in memory.items():
        key, _, attribute = name.rpartition(".")
        now = here.values["handlers"].get(key, {})
        is_attribute = "class" in now and now.get(attribute, ABSENT) != value
        if is_attribute or here.closures.get(name, value) != value:
            lost.append(f"{name} was {value!r:.80}")
    if lost:
        logger.warning(
            "The checkpoint has no state of functions and of handlers without state_dict(), which "
            "start anew: %s.\n"
            "If the result depends on it, give them state_dict() and load_state_dict(), or keep it "
            "in trainer.state, which is saved.",
            listed(lost),
        )


def _add_to_state(trainer: RunParts, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        held = getattr(trainer.state, name, None)
        device = held.device if isinstance(held, Tensor) else trainer.device
        setattr(trainer.state, name, to_device(value, device))


def _wanted(
    section: str, current: Mapping[str, Any], saved: RunIdentity, here: RunIdentity
) -> dict[str, bool]:
    """Return the saved values of the names for which the script declares the same as then."""
    there, own = saved.values[section], here.values[section]
    same = [name for name in there if name in own and there[name] == own[name]]
    return {name: current[section].get(name, there[name]) for name in same}


def _set_attributes(
    module: nn.Module,
    values: Mapping[str, Any],
    there: Mapping[str, Any],
    own: Mapping[str, Any],
) -> None:
    for name, value in values.items():
        if name != "class" and there.get(name) == own.get(name):
            held = getattr(module, name, None)
            if isinstance(held, dict):  # others may refer to it
                keys = {str(key): key for key in held}
                held.update({keys.get(key, key): _as_tuple(one) for key, one in value.items()})
            else:
                setattr(module, name, _as_tuple(value))


def _class_of(module: nn.Module) -> str:
    return class_name(type(module))


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


# -- the optimizer's groups -----------------------------------------------------------------------


def apply_script(
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    saved: RunIdentity,
    here: RunIdentity,
) -> list[dict[str, Any]]:
    """Return saved groups with the options that the script has changed.

    An option that the script declares as it did keeps its saved value. A rate that it declares
    otherwise is scaled by new / old, so that a schedule without a formula continues. If the script
    has no schedule any more, its rate applies. The optimizer is this run's; its groups correspond
    to the saved ones.
    """
    there, own = ([*one.values["optimizer"]["groups"].values()] for one in (saved, here))
    merged = [dict(group) for group in groups]
    for new, live, before, now in zip(merged, optimizer.param_groups, there, own, strict=False):
        for name in live.keys() - {"params", *RATES}:
            if name not in new or before.get(name) != now.get(name):
                new[name] = live[name]
        _set_rates(new, live, before, now)
    return merged


def _set_rates(
    new: dict[str, Any], live: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Set the rate of a group, and `initial_lr`, the rate that a schedule multiplies."""
    scheduled_then, scheduled_now = "initial_lr" in before, "initial_lr" in now
    if scheduled_now:
        name = "initial_lr" if scheduled_then else "lr"
        if before.get(name) != now["initial_lr"]:
            new["lr"] = scaled_rate(new["lr"], before.get(name), now["initial_lr"])
        if not scheduled_then or before["initial_lr"] != now["initial_lr"]:
            new["initial_lr"] = live["initial_lr"]
    elif scheduled_then:
        new.pop("initial_lr", None)
        new["lr"] = live["lr"]
    elif before.get("lr") != now.get("lr"):
        new["lr"] = scaled_rate(new["lr"], before.get("lr"), now.get("lr"))
