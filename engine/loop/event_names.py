"""Checks of events and of the functions that are added to them."""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

OTHERS = {
    "validation": "EVALUATED",
    "evaluat": "EVALUATED",
    "test_": "EVALUATED",
    "optimizer_step": "OPTIMIZER_STEPPED",
    "before_optimizer": "GRADIENTS_READY",
    "after_backward": "GRADIENTS_READY",
    "zero_grad": "GRADIENTS_READY",
    "checkpoint": "SAVED",
    "exception": "EXCEPTION_RAISED",
}
"""Parts of the names of other trainers' hooks, and the event that fires there; the last one that
fits counts."""

WORDS = {
    **dict.fromkeys(("batch", "step"), "ITERATION"),
    **dict.fromkeys(("end", "ended", "finish", "finished", "complete", "done"), "COMPLETED"),
    **dict.fromkeys(("start", "begin", "starts"), "STARTED"),
    **dict.fromkeys(("on", "train", "training", "fit", "run"), ""),
}


def check_event(event: Any, allowed: Iterable[Any]) -> None:
    """Check that an event is one of those that an engine fires.

    Raises:
        ValueError: if it is not; the message names the nearest one.
    """
    events = list(allowed)
    if event in events:
        return
    name = str(getattr(event, "name", event))
    near = _nearest(name, {getattr(one, "name", str(one)): one for one in events})
    way_out = "diptych.engine.events shows all of them"
    if isinstance(event, type):
        name = f"the class {event.__name__}"
        way_out = f"Choose one of its members: {event.__name__}.NAME"
    elif callable(event) and not hasattr(event, "filter"):
        name = f"the function {getattr(event, '__name__', event)}"
        way_out = "Write add_event_handler(event, function)"
    elif near is not None:
        way_out = f"Did you mean {_shown(near)}?"
    raise ValueError(f"event must be one that this engine fires, got {name}. {way_out}")


def check_function(event: Any, function: Any) -> None:
    """Check that a function of an event can be called.

    Raises:
        TypeError: if it cannot.
    """
    if callable(function):
        return
    way_out = "Pass the function itself, not its result"
    if inspect.isroutine(event):
        way_out = f"The event comes first, before {event.__name__}"
    raise TypeError(
        f"handler must be a function, got a {type(function).__name__}. {way_out}: "
        "add_event_handler(event, function)"
    )


def check_signature(function: Any, *arguments: Any, **keywords: Any) -> None:
    """Check that a function of an event takes the engine and the arguments given for it, or these.

    Raises:
        ValueError: if it takes neither.
    """
    signature = inspect.signature(function)
    for given in (arguments, arguments[1:]):
        try:
            signature.bind(*given, **keywords)
        except TypeError:
            continue
        return
    name = getattr(function, "__name__", type(function).__name__)
    raise ValueError(
        f"handler must take the engine or no argument, got {name}{signature}. Other arguments "
        "follow the function: add_event_handler(event, function, argument)"
    )


def stepped_by(function: Any) -> Any:
    """Return the scheduler or optimizer whose `step` method a function is; None for others.

    Such a method takes nothing that an engine could be: its arguments are an epoch or a closure.

    Raises:
        TypeError: if it needs an argument, such as the value of a metric.
    """
    owner = _owner_of(function)
    if owner is None or getattr(function, "__name__", "") != "step":
        return None
    _, *named = inspect.signature(type(owner).step).parameters.values()
    needed = [one for one in named if one.default is inspect.Parameter.empty]
    if not isinstance(owner, (LRScheduler, Optimizer)):  # a user's own
        known = any(one.name in {"epoch", "closure"} for one in named)
        return owner if known and not needed else None
    if needed:
        raise TypeError(
            f"handler must pass {needed[0].name} to {type(owner).__name__}.step, got the method "
            "itself. Write a function that does: lambda trainer: "
            "scheduler.step(trainer.state.metrics['val/loss']), for example"
        )
    return owner


def _owner_of(function: Any) -> Any:
    """Return the object of a method; torch's schedulers put a function in place of the method."""
    if hasattr(function, "_wrapped_by_lr_sched"):
        held = inspect.getclosurevars(function).nonlocals.values()
        return next((one() for one in held if isinstance(one, weakref.ref)), None)
    return getattr(function, "__self__", None)


def _nearest(name: str, events: dict[str, Any]) -> Any:
    meant = [to for part, to in OTHERS.items() if part in name.lower() and to in events]
    if name.upper() not in events and meant:
        return events[meant[-1]]
    words = [WORDS.get(word, word.upper()) for word in name.lower().split("_")]
    for tried in (name.upper(), "_".join(filter(None, words))):
        near = difflib.get_close_matches(tried, events, n=1, cutoff=0.75)
        if near:
            return events[near[0]]
    return None


def _shown(event: Any) -> str:
    return f"{type(event).__name__}.{event.name}" if hasattr(event, "name") else repr(event)
