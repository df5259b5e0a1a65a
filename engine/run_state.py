"""The whole state of a run: what a checkpoint holds, and how a trainer takes it back."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import ignite
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from diptych.engine.distributed import rank, world_size
from diptych.engine.errors import CheckpointError
from diptych.engine.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

FORMAT = 1
"""Raised when a checkpoint's layout changes so that an older version cannot read it."""


def run_state(trainer: Trainer) -> dict[str, Any]:
    """Return everything that the rest of the run depends on: tensors, numbers, strings, lists.

    Call it where nothing is pending (`RunEvents.SAFE_POINT`). Tensors are the live ones, not
    copies. Over several ranks it is collective: random states and metrics are those of all ranks,
    the handlers' states are this rank's.
    """
    return {
        "format": FORMAT,
        "model": clean_state_dict(trainer.model),
        "loss": clean_state_dict(trainer.loss),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": None if trainer.scaler is None else trainer.scaler.state_dict(),
        "skipped_steps": trainer.skipped_steps,
        "trainer": dict(trainer.state_dict()),
        "metrics": _of_all_ranks(trainer.metrics.state_dict()),
        "last_metrics": {k: float(v) for k, v in trainer.state.metrics.items() if _is_number(v)},
        "handlers": {name: h.state_dict() for name, h in stateful_handlers(trainer).items()},
        "random": _of_all_ranks(random_state()),
        "data": trainer.batches.position(),
        "fingerprint": fingerprint(trainer),
    }


def load_run_state(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Put a trainer, and everything attached to it, into a state that `run_state` returned.

    The trainer's loader, where the run stopped inside an epoch, is the one in
    `trainer.state.dataloader`.

    Raises:
        CheckpointError: if the state belongs to another model, loss, optimizer or set of handlers;
            nothing has been changed then.
        ResumeError: if the loader cannot go to the position.
    """
    handlers = stateful_handlers(trainer)
    _check(trainer, state, handlers)
    load_clean_state_dict(trainer.model, state["model"])
    load_clean_state_dict(trainer.loss, state["loss"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.scaler is not None and state["scaler"] is not None:
        trainer.scaler.load_state_dict(state["scaler"])
        trainer.skipped_steps.copy_(state["skipped_steps"])
    for name, handler in handlers.items():
        handler.load_state_dict(state["handlers"][name])
    trainer.load_state_dict(state["trainer"])
    trainer.metrics.load_state_dict(_metrics_of_this_rank(state["metrics"]))
    trainer.state.metrics.update(state["last_metrics"])
    if trainer.epoch_iteration:
        trainer.set_data(trainer.state.dataloader)
        trainer.batches.restore(state["data"])
    states = state["random"]
    set_random_state(states[min(rank(), len(states) - 1)])


def stateful_handlers(trainer: Trainer) -> dict[str, Any]:
    """Return by name every handler that has a state, attached or added to an event, in their order.

    The name is the class's, with a number from the second of a class on.
    """
    own = (trainer, trainer.model, trainer.loss, trainer.optimizer, trainer.metrics)
    seen = {id(part) for part in own}
    named: dict[str, Any] = {}
    for candidate in (*trainer.handlers, *_owners_of_functions(trainer)):
        if id(candidate) not in seen and _has_state(candidate):
            seen.add(id(candidate))
            kind = type(candidate).__name__
            count = 1 + sum(type(handler).__name__ == kind for handler in named.values())
            named[kind if count == 1 else f"{kind}_{count}"] = candidate
    return named


def _owners_of_functions(trainer: Trainer) -> Iterator[Any]:
    """Give the object behind each function that was added to an event."""
    for entries in trainer._event_handlers.values():  # noqa: SLF001 - Ignite lists them nowhere else
        for function, _, _ in entries:
            parent = getattr(function, "_parent", None)
            for added in getattr(function, "handlers", None) or [parent() if parent else function]:
                yield getattr(added, "__self__", added)


def _has_state(candidate: Any) -> bool:
    if isinstance(candidate, type):
        return False
    return hasattr(candidate, "state_dict") and hasattr(candidate, "load_state_dict")


def clean_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state with the keys of the bare module, whatever wraps it or its parts."""
    return {key.replace("_orig_mod.", ""): v for key, v in unwrapped(module).state_dict().items()}


def load_clean_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state with the keys of the bare module into a module that may be wrapped."""
    bare = unwrapped(module)
    bare.load_state_dict({key: state[key.replace("_orig_mod.", "")] for key in bare.state_dict()})


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside data-parallel and compiled wrappers."""
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            module = module.module
        elif "_orig_mod" in dict(module.named_children()):
            module = module.get_submodule("_orig_mod")
        else:
            return module


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
    _check_optimizer(trainer.optimizer, state)
    missing = sorted(set(handlers) - set(state["handlers"]))
    if missing:
        raise CheckpointError(
            f"the checkpoint has no state of {', '.join(missing)}, but of "
            f"{', '.join(state['handlers']) or 'no handler'}: attach the handlers of the saved run"
        )


def _check_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Check what the optimizer itself would notice too late, or not at all."""
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
    windows = [state["window"] for state in states]
    mean = {
        tag: {
            "tensors": _mean_of([window[tag]["tensors"] for window in windows]),
            "numbers": [
                statistics.fmean(v) for v in zip(*(w[tag]["numbers"] for w in windows), strict=True)
            ],
        }
        for tag in windows[0]
    }
    return {**states[0], "window": mean}


def _mean_of(tensors: list[Tensor | None]) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(given).mean(0) if given else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
