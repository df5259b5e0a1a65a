"""The cadence of a handler: once an epoch, or once every n iterations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import attrs
from ignite.engine import Events

from diptych.engine.checks import is_whole
from diptych.engine.events import RunEvents

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer


def is_cadence(every: object) -> bool:
    """Return whether a value is "epoch" or a number of iterations >= 1."""
    return every == "epoch" or is_whole(every)


def check_every(_: Any, __: attrs.Attribute[Any], every: object) -> None:
    """Check that `every` is "epoch" or a number of iterations; an attrs validator.

    Raises:
        ValueError: if it is neither.
    """
    if not is_cadence(every):
        raise ValueError(f"every must be 'epoch' or a number of iterations >= 1, got {every!r}")


def call_every(
    trainer: Trainer, every: int | Literal["epoch"], function: Callable[[Any], object]
) -> None:
    """Call a function with the trainer at the end of each epoch, or every n iterations.

    A run that `max_iters` ends inside an epoch calls it at its end too.
    """
    if every == "epoch":
        trainer.add_event_handler(Events.EPOCH_COMPLETED, function)
        trainer.add_event_handler(RunEvents.EPOCH_CUT, function)
    else:
        trainer.every(every, function)
