"""The whole state of a run: what a checkpoint holds, and how a trainer takes it back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import ignite
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.dtensor import shard_of
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import CheckpointError
from diptych.engine.metrics.metrics_buffer import mean_of_windows
from diptych.engine.modules import named_parameters
from diptych.engine.random_state import (
    preserved_random_state,
    random_state,
    set_random_state,
)
from diptych.engine.state.module_state import clean_state_dict, load_clean_state_dict
from diptych.engine.state.plain_state import plain_state

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised when a checkpoint's layout changes so that an older version cannot read it."""


def run_state(trainer: Trainer) -> dict[str, Any]:
    """Return everything that the rest of the run depends on: tensors, numbers, strings, lists.

    Call it where nothing is pending (`RunEvents.SAFE_POINT`). Tensors are the live ones, not
    copies. Over several ranks it is collective: random states, metrics and the place in the data
    are those of all ranks, the handlers' states are this rank's. Of what is sharded this rank has
    its share.

    Raises:
        CheckpointError: naming a value that no checkpoint can hold.
    """
    with preserved_random_state():  # some loaders draw when they are asked where they stand
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
    """Put a trainer, and everything attached to it, into a state that `run_state` returned.

    Tensors may be whole or sharded, whatever they are here.

    The trainer's loader is the one in `trainer.state.dataloader`. A handler that the saved run
    did not have begins anew, and a saved state whose handler is gone is passed over: both are
    logged as a warning.

    Raises:
        CheckpointError: if the state belongs to another model, loss or optimizer, or to another
            number of handlers of one class, so that which is which cannot be told; nothing has
            been changed then.
        ResumeError: if the loader cannot go to the position.
    """
    handlers = stateful_handlers(trainer)
    _check(trainer, state, handlers)
    load_clean_state_dict(trainer.model, state["model"])
    load_clean_state_dict(trainer.loss, state["loss"])
    trainer.optimizer.load_state_dict(_optimizer_state(trainer.optimizer, state["optimizer"]))
    if trainer.scaler is not None and state["scaler"] is not None:
        trainer.scaler.load_state_dict(state["scaler"])
        trainer.skipped_steps.copy_(state["skipped_steps"])
    for name in handlers.keys() & state["handlers"].keys():
        handlers[name].load_state_dict(state["handlers"][name])
    trainer.load_state_dict(state["trainer"])
    trainer.metrics.load_state_dict(_metrics_of_this_rank(state["metrics"]))
    trainer.state.metrics.update(state["last_metrics"])
    _restore_data(trainer, state)
    states = state["random"]
    set_random_state(states[min(rank(), len(states) - 1)])
    if rank() == 0:
        _tell_differences(trainer, state, handlers)


def _restore_data(trainer: Trainer, state: Mapping[str, Any]) -> None:
    inside, places = bool(trainer.epoch_iteration), state["data"]
    if inside or trainer.state.dataloader is not None:
        trainer.set_data(trainer.state.dataloader)
        place = places[rank()] if len(places) == world_size() else places[0]
        trainer.batches.restore_place(place, inside=inside)


def stateful_handlers(trainer: Trainer) -> dict[str, Any]:
    """Return by name every handler that has a state, attached or added to an event, in their order.

    The name is the class's, with a number from the second of a class on.
    """
    counts: Counter[str] = Counter()
    named: dict[str, Any] = {}
    for candidate in attached(trainer):
        average = getattr(candidate, "ema_model", None)
        if _has_state(candidate) or isinstance(average, nn.Module):
            kind = type(candidate).__name__
            counts[kind] += 1
            name = kind if counts[kind] == 1 else f"{kind}_{counts[kind]}"
            # Ignite's EMAHandler does not say what it holds.
            named[name] = candidate if _has_state(candidate) else average
    return named


def attached(trainer: Trainer) -> list[Any]:
    """Return every object whose functions the trainer's events call, each once, in their order."""
    own = (trainer, trainer.model, trainer.loss, trainer.optimizer, trainer.metrics)
    found = {id(item): item for item in (*trainer.handlers, *_owners_of_functions(trainer))}
    return [item for key, item in found.items() if key not in {id(part) for part in own}]


def _owners_of_functions(trainer: Trainer) -> Iterator[Any]:
    """Give the object behind each function that was added to an event."""
    for listener in trainer.listeners:
        parent = getattr(listener.function, "_parent", None)  # Ignite's wrapper of a filtered one
        added = parent() if parent else listener.function
        yield getattr(added, "__self__", added)


def _has_state(candidate: Any) -> bool:
    if isinstance(candidate, type):
        return False
    return hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict")


def _optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's saved state in the layout of the parameters here."""
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
    """Return the settings, versions and kind of optimizer of a run, as strings and numbers."""
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


def _check(trainer: Trainer, state: Mapping[str, Any], handlers: Mapping[str, Any]) -> None:
    if state.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {state['format']}, and this version reads up to {FORMAT}: "
            "update diptych"
        )
    for part, module in (("model", trainer.model), ("loss", trainer.loss)):
        _check_keys(part, state[part], clean_state_dict(module))
    _check_optimizer(trainer, state)
    _check_handlers(state["handlers"], handlers)


def _check_handlers(saved: Collection[str], here: Collection[str]) -> None:
    """Check that no handler would get the state of another one of its class."""
    kinds = [Counter(name.partition("_")[0] for name in names) for names in (saved, here)]
    for kind in sorted(kinds[0].keys() & kinds[1].keys()):
        if kinds[0][kind] != kinds[1][kind]:
            raise CheckpointError(
                f"the checkpoint has states of {kinds[0][kind]} {kind}, and there are "
                f"{kinds[1][kind]} here, so that which is which cannot be told: attach as many, in "
                "the same order"
            )


def _tell_differences(
    trainer: Trainer, state: Mapping[str, Any], handlers: Mapping[str, Any]
) -> None:
    """Log what of the saved run is not as it is here."""
    fresh = sorted(handlers.keys() - state["handlers"].keys())
    gone = sorted(state["handlers"].keys() - handlers.keys())
    if fresh:
        logger.warning("not in the checkpoint, so they begin anew: %s", ", ".join(fresh))
    if gone:
        logger.warning("in the checkpoint and not attached any more: %s", ", ".join(gone))
    before, now = _flat(state["fingerprint"]), _flat(fingerprint(trainer))
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key]:
            logger.warning(
                "%s was %s when the run was saved, and is %s", key, before[key], now[key]
            )


def _flat(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    return {**fingerprint, **fingerprint["settings"], **fingerprint["versions"]} | {
        "settings": None,
        "versions": None,
    }


def parameter_names(trainer: Trainer) -> list[list[str]]:
    """Return the names of the optimizer's parameters by group, "" for what is of neither module."""
    named = named_parameters(trainer.model, trainer.loss)
    names = {id(parameter): name for name, parameter in named.items()}
    groups = trainer.optimizer.param_groups
    return [[names.get(id(p), "") for p in group["params"]] for group in groups]


def _check_optimizer(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Check what the optimizer itself would notice too late, or not at all."""
    optimizer = trainer.optimizer
    here, saved = type(optimizer).__name__, state["fingerprint"].get("optimizer")
    if saved not in {None, here}:
        raise CheckpointError(f"the checkpoint is of another optimizer: of {saved}, not of {here}")
    groups = [
        [len(group["params"]) for group in held["param_groups"]]
        for held in (state["optimizer"], optimizer.state_dict())
    ]
    if groups[0] != groups[1]:
        raise CheckpointError(
            f"the checkpoint is of another optimizer: its groups have {groups[0]} parameters, "
            f"and those here {groups[1]}"
        )
    held = parameter_names(trainer)
    for number, (there, own) in enumerate(zip(state.get("parameters", held), held, strict=True)):
        other = next((pair for pair in zip(there, own, strict=True) if pair[0] != pair[1]), None)
        if other is not None:
            raise CheckpointError(
                "the checkpoint's optimizer holds its parameters in another order: in group "
                f"{number} it has {other[0]} where {other[1]} is here, which would get its state"
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
        for what, keys in (("lacks", lacking), ("has besides", extra), ("has", shapes))
        if keys
    ]
    if told:
        raise CheckpointError(f"the checkpoint is of another {part}: it {'; it '.join(told)}")


@waits_at("collecting the ranks' metrics for a checkpoint")
def _of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    if world_size() == 1:
        return [state]
    states: list[dict[str, Any]] = [{}] * world_size()
    dist.all_gather_object(states, state)
    return states


def _metrics_of_this_rank(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return this rank's metrics; for another number of ranks, with the means of all in each.

    The values since the last log point are each rank's own, and a log point averages over ranks.
    """
    if len(states) == world_size():
        return states[rank()]
    return {**states[0], "window": mean_of_windows([state["window"] for state in states])}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
