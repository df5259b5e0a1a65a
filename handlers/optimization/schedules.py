"""Learning-rate schedules, and the length of the run over which a schedule extends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import attrs
from ignite.engine import Events
from torch import Tensor

from diptych.engine.checks import whole_number
from diptych.engine.handler import Change, Handler
from diptych.engine.trainer import Trainer
from diptych.handlers.argument_checks import number, one_of

Decay = Literal["cosine", "linear", "constant"]


@attrs.define(kw_only=True, eq=False)
class LearningRate(Handler):
    """Sets the learning rates: a linear warm-up, then a decay.

    The rate of iteration t, counted from 1, is the parameter group's own rate times a factor:
    t / warmup during the warm-up; then, with p = (t - 1 - warmup) / (total - warmup),
    floor + (1 - floor) (1 + cos(pi p)) / 2 (cosine), floor + (1 - floor) (1 - p) (linear) or 1
    (constant); after `total`, the last value. It depends on the iteration only, so a resumed run
    has the rates of an uninterrupted one.

    A group's own rate is `initial_lr`, the name that torch's schedulers use: its rate when this
    handler was attached, kept in the optimizer's state. The current rates are published at each log
    point: `train/learning_rate` for the first group and, if groups have different rates,
    `train/learning_rate/<group>`, where <group> is the group's "name" or its number.

    Event: `Events.ITERATION_STARTED`.
    Cost: under 2 microseconds an iteration, no synchronisation.

    Args:
        warmup: iterations until the full rate.
        decay: "cosine", "linear" or "constant".
        floor: the final factor of the decay, in [0, 1].
        total: iterations until the decay ends. Default: those of the run, `max_epochs` times the
            length of an epoch, or `max_iters`.

    Raises:
        ValueError: if an argument is out of range; when attached, if the trainer has a LearningRate
            already; when a run starts, if its length is needed and unknown, or the warm-up is not
            shorter than it.
    """

    changes: ClassVar[frozenset[Change]] = frozenset({Change.RATES})

    warmup: int = attrs.field(default=200, validator=whole_number(0, of="iterations"))
    decay: Decay = attrs.field(default="cosine", validator=one_of(Decay))
    floor: float = attrs.field(
        default=0.0,
        validator=number("be a share of the rate in [0, 1]", lambda value: 0 <= value <= 1),
    )
    total: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(whole_number(of="iterations"))
    )

    def attach(self, trainer: Trainer) -> None:
        """Set the rates of the trainer's optimizer before each iteration."""
        if trainer.handlers_of(LearningRate):
            raise ValueError("a trainer must have one LearningRate, got a second one")
        groups = trainer.optimizer.param_groups
        for group in groups:
            group.setdefault("initial_lr", float(group["lr"]))
        trainer.metrics.gauge("train/learning_rate", rate_of(trainer, 0))
        if len({group["initial_lr"] for group in groups}) > 1:
            for index, group in enumerate(groups):
                tag = f"train/learning_rate/{group.get('name', index)}"
                trainer.metrics.gauge(tag, rate_of(trainer, index))
        trainer.add_event_handler(Events.STARTED, self._check_length)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._set)

    def factor(self, iteration: int, total: int | None) -> float:
        """Return the factor of the groups' own rates.

        Args:
            iteration: counted from 1.
            total: iterations until the decay ends, more than the warm-up; None if the rate is
                constant.
        """
        if iteration <= self.warmup:
            return iteration / self.warmup
        if self.decay == "constant" or total is None:
            return 1.0
        done = min(1.0, (iteration - 1 - self.warmup) / (total - self.warmup))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.floor + (1 - self.floor) * left

    def _set(self, trainer: Trainer) -> None:
        factor = self.factor(trainer.state.iteration, self.total or iterations_of_run(trainer))
        for group in trainer.optimizer.param_groups:
            set_rate(group, factor * group.setdefault("initial_lr", group["lr"]))

    def _check_length(self, trainer: Trainer) -> None:
        check_length(self, iterations_of_run(trainer), "the run")


def check_length(schedule: LearningRate, length: int | None, of: str) -> None:
    """Check that a schedule fits into a run or a stage.

    Args:
        schedule: the schedule.
        length: iterations of the run or stage; None if unknown.
        of: the run or stage, for the message.

    Raises:
        ValueError: if the end of a decay is unknown, or the warm-up is not shorter than it.
    """
    total = schedule.total or length
    if schedule.decay == "constant":
        return
    if total is None:
        raise ValueError(
            f"a {schedule.decay} decay needs the length of {of}, got a loader without one. Pass "
            "total to LearningRate, or run with an epoch_length"
        )
    if schedule.warmup >= total:
        raise ValueError(
            f"the warmup of {of} must be shorter than the {total} iterations until the decay ends, "
            f"got {schedule.warmup}. Shorten it, or pass a larger total"
        )


def iterations_of_run(trainer: Trainer) -> int | None:
    """Return the iterations that the current run is to have; None if its length is unknown."""
    state = trainer.state
    if state.max_iters is not None:
        return int(state.max_iters)
    if state.max_epochs is None or state.epoch_length is None:
        return None
    return state.max_epochs * state.epoch_length


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the rate of a parameter group, in place if it is a tensor."""
    if isinstance(group["lr"], Tensor):  # a captured or compiled optimizer reads this tensor
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def rate_of(trainer: Trainer, index: int) -> Callable[[], Tensor | float]:
    """Return a function that reads the current rate of a parameter group."""

    # Looked up in each call: loading an optimizer's state replaces its groups.
    def rate() -> Tensor | float:
        value: Tensor | float = trainer.optimizer.param_groups[index]["lr"]
        return value

    return rate
