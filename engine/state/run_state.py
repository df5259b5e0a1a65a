"""The state of a whole run, as a checkpoint holds it: read from a trainer, and loaded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import ignite
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.dtensor import shard_of
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import CheckpointError
from diptych.engine.metrics.metrics_buffer import mean_of_buffers
from diptych.engine.modules import named_parameters
from diptych.engine.random_state import (
    preserved_random_state,
    random_state,
    set_random_state,
)
from diptych.engine.state.handler_states import match_states, stateful_handlers
from diptych.engine.state.module_state import clean_state_dict, load_clean_state_dict
from diptych.engine.state.plain_state import plain_state

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)

FORMAT = 2
"""The layout of a checkpoint; it rises when an older version could not read a new one.

1 named the handlers' states by class alone, 2 names them by `Handler.key`."""


def run_state(trainer: Trainer) -> dict[str, Any]:
    """Return everything that the rest of the run depends on, as tensors, numbers and strings.

    Call it when nothing is pending (`RunEvents.SAFE_POINT`). Tensors are not copied. Over several
    ranks the call is collective: random states, metrics and positions in the data are those of all
    ranks, handlers' states are this rank's, and sharded tensors are this rank's shards.

    Raises:
        CheckpointError: if a checkpoint cannot hold a value; the message gives its path.
    """
    with preserved_random_state():  # the state_dict() of some loaders draws random numbers
        place = trainer.batches.place()
    state = {
        "format": FORMAT,
        "model": clean_state_dict(trainer.model),
        "loss": clean_state_dict(trainer.loss),
        "optimizer": trainer.optimizer.state_dict(),
        "parameters": parameter_names(trainer),
        "scaler": None if trainer.scaler is None else trainer.scaler.state_dict(),
        "skipped_steps": trainer.skipped_steps,
        "trainer": dict(trainer.state_dict()),
        "metrics": _of_all_ranks(trainer.metrics.state_dict()),
        "last_metrics": {k: float(v) for k, v in trainer.state.metrics.items() if _is_number(v)},
        "handlers": {name: h.state_dict() for name, h in stateful_handlers(trainer).items()},
        "random": _of_all_ranks(random_state()),
        "data": _of_all_ranks(place),
        "fingerprint": fingerprint(trainer),
    }
    return dict(plain_state(state))


def load_run_state(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Restore a trainer, and everything attached to it, from a state that `run_state` returned.

    Tensors may be whole or sharded, in the state and in the trainer.

    The trainer's loader is the one in `trainer.state.dataloader`. A handler's state goes to the
    handler with the same key. A handler that the saved run did not have starts fresh, and a saved
    state whose handler is gone is dropped: both are logged as a warning.

    Raises:
        CheckpointError: if the state belongs to another model, loss or optimizer, or several
            handlers share a key and their number has changed. Nothing has been modified then.
        ResumeError: if the loader cannot go to the position.
    """
    handlers = stateful_handlers(trainer)
    _check(trainer, state)
    states = match_states(state["handlers"], handlers, by_class=state.get("format", 0) < 2)
    load_clean_state_dict(trainer.model, state["model"])
    load_clean_state_dict(trainer.loss, state["loss"])
    trainer.optimizer.load_state_dict(_optimizer_state(trainer.optimizer, state["optimizer"]))
    if trainer.scaler is not None and state["scaler"] is not None:
        trainer.scaler.load_state_dict(state["scaler"])
        trainer.skipped_steps.copy_(state["skipped_steps"])
    for key, handler_state in states.items():
        handlers[key].load_state_dict(handler_state)
    trainer.load_state_dict(state["trainer"])
    trainer.metrics.load_state_dict(_metrics_of_this_rank(state["metrics"]))
    trainer.state.metrics.update(state["last_metrics"])
    _restore_data(trainer, state)
    set_random_state(state["random"][min(rank(), len(state["random"]) - 1)])
    if rank() == 0:
        _log_handlers(states, handlers, state["handlers"])
        _log_differences(state["fingerprint"], fingerprint(trainer))


def _restore_data(trainer: Trainer, state: Mapping[str, Any]) -> None:
    inside, places = bool(trainer.epoch_iteration), state["data"]
    if inside or trainer.state.dataloader is not None:
        trainer.batches.switch(trainer.state.dataloader)
        place = places[rank()] if len(places) == world_size() else places[0]
        trainer.batches.restore_place(place, inside=inside)


def _optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
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


def fingerprint(trainer: Trainer) -> dict[str, Any]:
    """Return settings, versions and the optimizer's class, as strings and numbers."""
    settings = {
        k: v if isinstance(v, (int, float, bool, str)) or v is None else str(v)
        for k, v in attrs.asdict(trainer.settings).items()
    }
    versions = {"torch": str(torch.__version__), "ignite": str(ignite.__version__)}
    return {
        "settings": settings,
        "versions": versions,
        "optimizer": type(trainer.optimizer).__name__,
        "ranks": world_size(),
    }


def _check(trainer: Trainer, state: Mapping[str, Any]) -> None:
    if state.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"the checkpoint's format must be at most {FORMAT} for this version of diptych, got "
            f"{state['format']}. Update diptych"
        )
    for part, module in (("model", trainer.model), ("loss", trainer.loss)):
        _check_keys(part, state[part], clean_state_dict(module))
    _check_optimizer(trainer, state)


def _log_handlers(
    matched: Mapping[str, Any], here: Collection[str], saved: Mapping[str, Any]
) -> None:
    """Log which handlers start without a saved state, and which saved states nobody takes."""
    fresh = sorted(set(here) - set(matched))
    taken = {id(state) for state in matched.values()}
    missing = sorted(name for name, state in saved.items() if id(state) not in taken)
    if fresh:
        logger.warning("The checkpoint has no state of %s; they start fresh.", ", ".join(fresh))
    if missing:
        logger.warning(
            "The checkpoint has states of handlers that are not attached, which are ignored: %s.",
            ", ".join(missing),
        )


def _log_differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Log each setting and version that differs from the saved run's."""
    before, now = _flat(saved), _flat(here)
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key]:
            logger.warning(
                "%s was %s when the run was saved, and is %s.", key, before[key], now[key]
            )


def _flat(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    return {**fingerprint, **fingerprint["settings"], **fingerprint["versions"]} | {
        "settings": None,
        "versions": None,
    }


def parameter_names(trainer: Trainer) -> list[list[str]]:
    """Return the names of the optimizer's parameters by group; "" if in neither module."""
    named = named_parameters(trainer.model, trainer.loss)
    names = {id(parameter): name for name, parameter in named.items()}
    groups = trainer.optimizer.param_groups
    return [[names.get(id(p), "") for p in group["params"]] for group in groups]


def _check_optimizer(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Check that a saved optimizer state fits: class, group sizes, order of parameters.

    The optimizer itself would notice a misfit too late, or not at all.
    """
    optimizer = trainer.optimizer
    here, saved = type(optimizer).__name__, state["fingerprint"].get("optimizer")
    if saved not in {None, here}:
        raise CheckpointError(f"optimizer must be the checkpoint's {saved}, got {here}")
    groups = [
        [len(group["params"]) for group in held["param_groups"]]
        for held in (state["optimizer"], optimizer.state_dict())
    ]
    if groups[0] != groups[1]:
        raise CheckpointError(
            f"optimizer must have the checkpoint's groups, of {groups[0]} parameters, got "
            f"{groups[1]}"
        )
    held = parameter_names(trainer)
    for number, (there, own) in enumerate(zip(state.get("parameters", held), held, strict=True)):
        other = next((pair for pair in zip(there, own, strict=True) if pair[0] != pair[1]), None)
        if other is not None:
            raise CheckpointError(
                "optimizer must hold its parameters in the checkpoint's order: in group "
                f"{number} the checkpoint has {other[0]}, got {other[1]}. Build the optimizer with "
                "its parameters in the order of the saved run"
            )


def _check_keys(part: str, saved: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    lacking = sorted(set(here) - set(saved))
    extra = sorted(set(saved) - set(here))
    shapes = [
        f"{key} {tuple(saved[key].shape)} instead of {tuple(here[key].shape)}"
        for key in here
        if key in saved and isinstance(here[key], Tensor) and saved[key].shape != here[key].shape
    ]
    told = [
        f"{what} {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
        for what, keys in (("lacks", lacking), ("has extra", extra), ("has", shapes))
        if keys
    ]
    if told:
        raise CheckpointError(f"{part} must match the checkpoint, which {'; which '.join(told)}")


@waits_at("collecting the ranks' metrics for a checkpoint")
def _of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    if world_size() == 1:
        return [state]
    states: list[dict[str, Any]] = [{}] * world_size()
    dist.all_gather_object(states, state)
    return states


def _metrics_of_this_rank(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return this rank's metrics; if the number of ranks has changed, the mean of all ranks'.

    The values since the last log point are each rank's own; a log point averages over ranks.
    """
    if len(states) == world_size():
        return states[rank()]
    return {**states[0], "window": mean_of_buffers([state["window"] for state in states])}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
