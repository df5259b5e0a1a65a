"""The cadence of a handler: once an epoch, or once every n iterations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import attrs
from ignite.engine import Events

from diptych.engine.checks import is_whole
from diptych.engine.events import RunEvents
from diptych.engine.loop.event_loop import EventLoop
from diptych.engine.loop.position import planned_iterations

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
        waits = OwnedFunction(function, EventLoop.waits_for_epoch)
        trainer.add_event_handler(Events.STARTED, waits)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, function)
        trainer.add_event_handler(RunEvents.EPOCH_CUT, function)
    else:
        trainer.every(every, function)


class OwnedFunction:
    """A function of the trainer that belongs to a handler, as the handler's methods do.

    The function is called with the trainer and the handler.
    """

    def __init__(self, method: Callable[..., object], function: Callable[..., object]) -> None:
        owner = getattr(method, "__self__", method)
        self.__self__, self.__name__ = owner, getattr(function, "__name__", "function")
        self._function = function

    def __call__(self, trainer: Trainer) -> None:
        """Call the function."""
        self._function(trainer, self.__self__)


def call_before_first_batch(trainer: Trainer, method: Callable[[Any], object]) -> None:
    """Call a handler's method with the trainer once a run, before it fetches its first batch.

    By then every handler of `STARTED` and `EPOCH_STARTED` has run: a stage has set its task.
    """

    def await_first_batch(trainer: Trainer, _: object) -> None:
        def call_once(trainer: Trainer, _: object) -> None:
            handle.remove()
            method(trainer)

        call = OwnedFunction(method, call_once)
        handle = trainer.add_event_handler(Events.GET_BATCH_STARTED, call)

    trainer.add_event_handler(Events.STARTED, OwnedFunction(method, await_first_batch))


def log_point_period(trainer: Trainer) -> int:
    """Return the trainer's `log_every`; in a run without a multiple of it, the length of an epoch.

    There is a log point at the end of an epoch too, and at the end of a run.
    """
    state, every = trainer.state, trainer.settings.log_every
    planned = planned_iterations(state)
    if planned is None or planned >= every:
        return every
    return min(planned, state.epoch_length or planned)


def call_in_short_runs(trainer: Trainer, method: Callable[[Any], object], event: Any) -> None:
    """Call a handler's method every `log_point_period` iterations if that is not `log_every`."""
    periods = {trainer.settings.log_every}

    def start(trainer: Trainer, _: object) -> None:
        def call(trainer: Trainer, _: object) -> None:
            if period == log_point_period(trainer):  # not that of a later, longer run
                method(trainer)

        period = log_point_period(trainer)
        if period not in periods:
            periods.add(period)
            trainer.every(period, OwnedFunction(method, call), event)

    trainer.add_event_handler(Events.STARTED, OwnedFunction(method, start))
