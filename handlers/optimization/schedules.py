"""Numbers that follow a plan while a run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import attrs
from ignite.engine import Events
from torch import Tensor

from diptych.engine.checks import whole_number
from diptych.engine.trainer import Trainer

Decay = Literal["cosine", "linear", "constant"]


def _check_decay(_: Any, __: attrs.Attribute[str], value: object) -> None:
    if value not in get_args(Decay):
        raise ValueError(f"decay must be one of {', '.join(get_args(Decay))}, got {value!r}")


def _check_floor(_: Any, __: attrs.Attribute[float], value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"floor must be a share of the rate in [0, 1], got {value!r}")


@attrs.define(kw_only=True, eq=False)
class LearningRate:
    """Sets the learning rates: a linear warm-up, then a decay.

    The rate of iteration t, counted from 1, is the parameter group's own rate times a factor: in
    the warm-up t / warmup; then, with p = (t - 1 - warmup) / (total - warmup) of the rest done,
    floor + (1 - floor) (1 + cos(pi p)) / 2 (cosine), floor + (1 - floor) (1 - p) (linear) or 1
    (constant); after `total` what it ends with. It is a function of the iteration and nothing else,
    so a resumed run has the rates of one that was never interrupted.

    A group's own rate is `initial_lr`, as torch's schedulers call it: the rate that it had when
    this was attached, kept in the optimizer's state. The rates in use are published at each log
    point: `train/learning_rate`, that of the first group, and where groups have different rates
    `train/learning_rate/<group>` too, by the group's "name" or its number.

    Event: `Events.ITERATION_STARTED`.
    Cost: under 2 microseconds an iteration, no synchronisation.

    Args:
        warmup: iterations until the full rate.
        decay: "cosine", "linear" or "constant".
        floor: the share of the rate that the decay ends at, in [0, 1].
        total: iterations until the decay ends. Default: those of the run, `max_epochs` times the
            length of an epoch, or `max_iters`.

    Raises:
        ValueError: if an argument is out of range; when attached, if the trainer has a LearningRate
            already; when a run starts, if its length is needed and unknown, or the warm-up
            does not end within it.
    """

    warmup: int = attrs.field(default=200, validator=whole_number(0, of="iterations"))
    decay: Decay = attrs.field(default="cosine", validator=_check_decay)
    floor: float = attrs.field(default=0.0, validator=_check_floor)
    total: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(whole_number(of="iterations"))
    )

    def attach(self, trainer: Trainer) -> None:
        """Set the rates of the trainer's optimizer before each iteration."""
        if any(isinstance(other, LearningRate) for other in trainer.handlers):
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
        """Return what the groups' own rates are multiplied by.

        Args:
            iteration: counted from 1.
            total: iterations until the decay ends, more than the warm-up; None where the rate is
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
        factor = self.factor(trainer.state.iteration, self._length(trainer))
        for group in trainer.optimizer.param_groups:
            set_rate(group, factor * group.setdefault("initial_lr", group["lr"]))

    def _length(self, trainer: Trainer) -> int | None:
        state = trainer.state
        if self.total is not None:
            return self.total
        if state.max_iters is not None:
            return int(state.max_iters)
        if state.max_epochs is None or state.epoch_length is None:
            return None
        return state.max_epochs * state.epoch_length

    def _check_length(self, trainer: Trainer) -> None:
        if self.decay == "constant":
            return
        total = self._length(trainer)
        if total is None:
            raise ValueError(
                f"a {self.decay} decay needs the run's length, got a loader without one: give "
                "LearningRate a total, or run an epoch_length"
            )
        if self.warmup >= total:
            raise ValueError(
                f"warmup must be shorter than the {total} iterations until the decay ends, got "
                f"{self.warmup}: shorten it, or give a larger total"
            )


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the rate of a parameter group, in place where it is a tensor."""
    if isinstance(group["lr"], Tensor):  # a captured or compiled optimizer reads this one
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def rate_of(trainer: Trainer, index: int) -> Callable[[], Tensor | float]:
    """Return a function that reads the rate in use of a parameter group."""

    # Loading an optimizer's state replaces its groups: they are looked up each time.
    def rate() -> Tensor | float:
        value: Tensor | float = trainer.optimizer.param_groups[index]["lr"]
        return value

    return rate
