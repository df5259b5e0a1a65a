"""The cadence of a handler: once an epoch, or once every n iterations."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import attrs
from ignite.engine import Events
from ignite.engine.events import RemovableEventHandle

from diptych.engine.checks import is_whole
from diptych.engine.distributed.collectives import rank
from diptych.engine.events import RunEvents

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)


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
        owner = getattr(function, "__self__", function)
        name = getattr(owner, "key", None) or getattr(function, "__name__", type(owner).__name__)
        trainer.add_event_handler(Events.STARTED, report_endless, name)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, function)
        trainer.add_event_handler(RunEvents.EPOCH_CUT, function)
    else:
        trainer.every(every, function)


def call_before_first_batch(trainer: Trainer, function: Callable[[Any], object]) -> None:
    """Call a function with the trainer once a run, before it fetches its first batch.

    By then every handler of `STARTED` and `EPOCH_STARTED` has run: a stage has set its task.
    """
    added: list[RemovableEventHandle] = []

    def start() -> None:
        added.append(trainer.add_event_handler(Events.GET_BATCH_STARTED, call))

    def call() -> None:
        for handle in added:
            handle.remove()
        added.clear()
        function(trainer)

    trainer.add_event_handler(Events.STARTED, start)


def report_endless(trainer: Trainer, name: str) -> None:
    """Log, at the start of a run, that a handler waits for an epoch that may never end.

    Args:
        trainer: the trainer whose run starts.
        name: of the handler.
    """
    state = trainer.state
    if state.max_iters is not None and state.epoch_length is None and rank() == 0:
        logger.warning(
            "%s acts at the end of each epoch, and the %s has no length. If it is endless, no "
            "epoch ends before the run does: pass epoch_length= to run, or every=<iterations> to "
            "the handler.",
            name,
            type(state.dataloader).__name__,
        )
