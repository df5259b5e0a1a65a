"""Learning-rate schedulers of torch and Ignite: found behind the functions at events, and saved."""

from __future__ import annotations

import gc
import itertools
import logging
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakSet

import numpy as np
from ignite.handlers.param_scheduler import BaseParamScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diptych.engine.handler import Stateful
from diptych.engine.state.references import (
    behind_events,
    is_scheduler,
    other_optimizers,
    reachable,
)
from diptych.engine.state.run_parts import RunParts

logger = logging.getLogger(__name__)

_REPORTED: WeakSet[Any] = WeakSet()


class SavedScheduler:
    """A scheduler whose state consists of plain values; all other attributes are its own.

    torch's and Ignite's schedulers put counters, functions and methods into their states, which a
    checkpoint cannot hold. They are settings: a new scheduler has them already.

    Args:
        scheduler: the scheduler.
    """

    def __init__(self, scheduler: Any) -> None:
        object.__setattr__(self, "_scheduler", scheduler)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_scheduler"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._scheduler, name, value)

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state without functions."""
        state: dict[str, Any] = _plain(self._scheduler.state_dict())
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self._scheduler.load_state_dict(_restored(state_dict, self._scheduler.state_dict()))


def _plain(value: Any) -> Any:
    """Return a state with built-in containers, and None for each function in a list."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if not callable(item)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        items = [None if callable(item) else _plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _restored(saved: Any, own: Any) -> Any:
    """Return a saved state with the types and the functions of the scheduler's own state."""
    if callable(own):
        return own
    if isinstance(saved, Mapping):
        there = own if isinstance(own, Mapping) else {}
        found = {key: _restored(item, there.get(key)) for key, item in saved.items()}
        found |= {key: item for key, item in there.items() if callable(item)}
        return Counter(found) if isinstance(own, Counter) else found
    if isinstance(own, np.ndarray):
        return np.asarray(saved, dtype=own.dtype)
    if isinstance(saved, (list, tuple)):
        there = own if isinstance(own, (list, tuple)) else ()
        pairs = itertools.zip_longest(saved, there[: len(saved)])
        items = [_restored(item, other) for item, other in pairs]
        kind = type(own) if isinstance(own, (tuple, set, frozenset, deque)) else type(saved)
        return kind(items)
    return saved


# -- the search ----------------------------------------------------------------------------------


def schedulers_behind(trainer: RunParts, optimizer: Optimizer | None = None) -> list[Any]:
    """Return the schedulers of an optimizer that functions at events refer to, in order.

    See `behind_events` for what a function refers to.

    Args:
        trainer: the trainer.
        optimizer: the optimizer. Default: the trainer's, and others that its functions refer to.
    """
    optimizers = [optimizer] if optimizer else [trainer.optimizer, *other_optimizers(trainer)]
    held = set().union(*map(_optimizers, optimizers))
    return [one for one in behind_events(trainer) if _schedules(one, held)]


def report_unsaved(trainer: RunParts, saved: Iterable[Any]) -> None:
    """Log, once for each trainer, the torch schedulers of its optimizer that are not saved.

    Args:
        trainer: the trainer.
        saved: the objects whose states a checkpoint holds.
    """
    if trainer in _REPORTED or not trainer.state.iteration:
        return
    _REPORTED.add(trainer)
    held = _optimizers(trainer.optimizer)
    everyone = [one for one in gc.get_objects() if issubclass(type(one), LRScheduler)]
    of_optimizer = [one for one in everyone if id(getattr(one, "optimizer", None)) in held]
    if not of_optimizer:
        return
    roots = [getattr(one, "_scheduler", one) for one in (*saved, *trainer.handlers)]
    known = {id(one) for one in reachable(roots, everything=True)}
    unsaved = sorted({type(one).__name__ for one in of_optimizer if id(one) not in known})
    if unsaved:
        logger.warning(
            "Checkpoints do not hold the state of %s, a scheduler of the optimizer, because no "
            "function at an event refers to it: a resumed run starts its schedule again. Add "
            "scheduler.step to an event, or save its state in a handler.",
            ", ".join(unsaved),
        )


def _optimizers(optimizer: Optimizer) -> set[int]:
    return {id(optimizer), *map(id, getattr(optimizer, "members", ()))}


def _schedules(candidate: Any, held: set[int]) -> bool:
    optimizer = getattr(candidate, "__dict__", {}).get("optimizer")
    if isinstance(candidate, BaseParamScheduler) and optimizer is None:
        return True
    steps = is_scheduler(candidate) or callable(getattr(type(candidate), "step", None))
    return steps and id(optimizer) in held and isinstance(candidate, Stateful)
