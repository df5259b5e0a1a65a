"""Curriculum: changes an attribute of the loss, the model or the task during a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import attrs
from ignite.engine import Events

from diptych.engine.checks import whole_number
from diptych.engine.errors import CheckpointError
from diptych.engine.events import MetricsEvents, RunEvents
from diptych.engine.handler import Change, Handler
from diptych.engine.trainer import Trainer
from diptych.handlers.argument_checks import one_of
from diptych.handlers.cadence import call_before_first_batch
from diptych.handlers.evaluation.watched_metric import check_name, check_published
from diptych.handlers.stages.attribute_paths import read_attribute, try_attribute, write_attribute

Shape = Literal["linear", "cosine", "step"]


@attrs.define(eq=False)
class Curriculum(Handler):
    """Changes an attribute from one value to another, from an iteration on or once a metric passes.

    ```python
    Curriculum("loss.invariance_weight", start=0, end=25, over=1000)
    Curriculum("loss.temperature.value", start=0.2, end=0.07, over=5000, shape="cosine")
    Curriculum("loss.negatives", start="sum", end="hardest", after=2000, shape="step")
    Curriculum("loss.alpha", end=1.0, over=500, metric="val/recall@1", above=0.4)
    ```

    In iteration t, counted from 1, let p = (t - 1 - after) / over, clamped to [0, 1]. The value is
    start + (end - start) p (linear), start + (end - start) (1 - cos(pi p)) / 2 (cosine), or `end`
    once p is 1 (step). With a metric, t counts from the iteration in which a value of it, from an
    evaluation or a log point, first passes the threshold; the change continues if the metric falls
    back. A `function` of t - 1 - after, the iterations since the change began, replaces the shape.

    The value is published at log points as `curriculum/<name>`; one that is not a number as 0
    before and 1 after the change. Such attributes do not belong to a module's state dict: the state
    of this handler contains the current value and when the change began, for a resumed run.

    In a compiled loss or model (`torch.compile`) a Python number is a constant, and each new value
    compiles it again until torch gives up. Use few steps there, or do not compile that part.

    Event: `Events.ITERATION_STARTED`; with a metric also `MetricsEvents.LOGGED` and
        `RunEvents.SAFE_POINT`.
    Cost: about eight microseconds an iteration during the change, half of one otherwise; no
        synchronisation.

    Args:
        path: the attribute: "loss", "model" or "task", then names of attributes, keys or indices.
        start: the value before the change. Default: the current one.
        end: the value after the change.
        over: duration of the change in iterations; 0: at once.
        shape: "linear", "cosine" or "step".
        after: iterations before the change begins.
        function: instead of start, end, over and shape: the value as a function of the iterations
            since the change began.
        metric: the name of a published value that starts the change. It must be equal on all ranks,
            as the values of evaluations and log points are.
        above: the threshold that the metric must exceed.
        below: the threshold that it must fall below, instead of `above`.
        name: the name in the tag. Default: the path.

    Attributes:
        value: the current value; None before the first iteration.
        began: the iteration after which the change began; None if it has not.

    Raises:
        ValueError: if arguments are out of range or contradict each other; when attached, if the
            path does not exist (the message lists similar names), another curriculum changes it, or
            its setter refuses one of the values.
        TypeError: when attached, if the path leads to a tensor or a module.
        KeyError: while running: if nothing has published the metric when its first value is due.
    """

    changes: ClassVar[frozenset[Change]] = frozenset({Change.LOSS})

    path: str
    start: Any = attrs.field(default=None, kw_only=True)
    end: Any = attrs.field(default=None, kw_only=True)
    over: int = attrs.field(default=0, validator=whole_number(0, of="iterations"), kw_only=True)
    shape: Shape = attrs.field(default="linear", validator=one_of(Shape), kw_only=True)
    after: int = attrs.field(default=0, validator=whole_number(0, of="iterations"), kw_only=True)
    function: Callable[[int], Any] | None = attrs.field(default=None, kw_only=True)
    metric: str | None = attrs.field(default=None, kw_only=True)
    above: float | None = attrs.field(default=None, kw_only=True)
    below: float | None = attrs.field(default=None, kw_only=True)
    name: str = attrs.field(kw_only=True)
    value: Any = attrs.field(default=None, init=False)
    began: int | None = attrs.field(default=None, init=False)
    _seen: bool = attrs.field(default=False, init=False, repr=False)
    _trainer: Trainer | None = attrs.field(default=None, init=False, repr=False)

    @name.default
    def _name_of_path(self) -> str:
        return self.path

    def __attrs_post_init__(self) -> None:
        if (self.function is None) == (self.end is None):
            raise ValueError(
                "a Curriculum needs either end or function, got "
                f"end={self.end!r} and function={self.function!r}"
            )
        if self.metric is None and (self.above is not None or self.below is not None):
            raise ValueError("above and below need a metric, got none")
        if self.metric is not None and (self.above is None) == (self.below is None):
            raise ValueError(
                f"a metric needs either above or below, got {self.above} and {self.below}"
            )
        if self.start is not None:
            self._check_numbers()

    def _check_numbers(self) -> None:
        ends = (self.start, self.end)
        if self.function is None and self.shape != "step" and not all(map(_is_number, ends)):
            raise ValueError(
                f"start and end of a {self.shape} curriculum must be finite numbers, got "
                f"{ends[0]!r} and {ends[1]!r}. Use shape='step'"
            )

    def attach(self, trainer: Trainer) -> None:
        """Check the path, and set the attribute before each iteration."""
        if any(other.path == self.path for other in trainer.handlers_of(Curriculum)):
            raise ValueError(f"an attribute must have one Curriculum, got a second: {self.path}")
        current = read_attribute(trainer, self.path)
        if self.start is None:
            self.start = current
            self._check_numbers()
        if self.function is None:
            try_attribute(trainer, self.path, self.start, self.end)
        self._trainer = trainer
        self._reset()
        trainer.metrics.gauge(f"curriculum/{self.name}", self._published)
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._set)
        if self.metric is not None:
            call_before_first_batch(trainer, self._check_name)
            trainer.add_event_handler(MetricsEvents.LOGGED, self._watch_metric)
            trainer.add_event_handler(RunEvents.SAFE_POINT, self._check_metric)

    @property
    def role(self) -> str:
        """The path of the attribute."""
        return self.path

    def at(self, done: int) -> Any:
        """Return the value `done` iterations after the change began; negative: before it."""
        if self.function is not None:
            return self.start if done < 0 else self.function(done)
        share = min(1.0, done / self.over) if self.over and done >= 0 else float(done >= 0)
        if share in {0.0, 1.0} or self.shape == "step":
            return self.end if share == 1 else self.start
        eased = share if self.shape == "linear" else (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * eased

    def state_dict(self) -> dict[str, Any]:
        """Return the path, the start, the current value and when the change began."""
        names = ("path", "start", "value", "began")
        return {**{name: getattr(self, name) for name in names}, "seen": self._seen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned, and set the attribute.

        Raises:
            CheckpointError: if it belongs to another attribute.
        """
        saved = state_dict.get("path", self.path)
        if saved != self.path:
            raise CheckpointError(
                f"the path of a Curriculum must be the checkpoint's, {saved}, got {self.path}. "
                "Attach several in the same order"
            )
        self.start, self.value = state_dict["start"], state_dict["value"]
        self.began = state_dict["began"]
        self._seen = state_dict["seen"]
        if self._trainer is not None and self.value is not None:
            write_attribute(self._trainer, self.path, self.value)

    def _reset(self) -> None:
        self.began, self._seen = (0 if self.metric is None else None), False

    def _start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0:
            self._reset()

    def _set(self, trainer: Trainer) -> None:
        done = -1 if self.began is None else trainer.state.iteration - 1 - self.began - self.after
        value = self.at(done)
        if value != self.value:
            write_attribute(trainer, self.path, value)
            self.value = value

    def _published(self) -> float:
        value = self.start if self.value is None else self.value
        return float(value) if _is_number(value) else float(value == self.end)

    def _check_name(self, trainer: Trainer) -> None:
        if not self._seen:
            check_name(trainer, "metric", str(self.metric))

    def _watch_metric(self, trainer: Trainer) -> None:
        value = trainer.metrics.record.values.get(str(self.metric))
        if value is None:
            return
        self._seen = True
        passed = value > self.above if self.above is not None else value < float(self.below or 0)
        if passed and self.began is None:
            self.began = trainer.state.iteration

    def _check_metric(self, trainer: Trainer) -> None:
        if not self._seen:
            check_published(trainer, str(self.metric))


def _is_number(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]
