"""Ends a run when a metric has stopped improving."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import attrs
from ignite.engine import Events

from diptych.engine.checks import whole_number
from diptych.engine.events import EvaluationEvents, RunEvents
from diptych.engine.trainer import Trainer
from diptych.handlers.run_progress import published, unpublished

logger = logging.getLogger(__name__)


@attrs.define(kw_only=True, eq=False)
class EarlyStopping:
    """Ends the run once `patience` values of a metric in a row have not improved on the best.

    Every value counts once: of an evaluation's metric (`val/recall@1`) each evaluation's, of any
    other (`train/loss`) each epoch's mean. A value that is not a number is no improvement.

    A run that was stopped stays so: continued, from a checkpoint too, it ends before its next
    iteration and says so in the log. `reset()` lets it go on. A run that starts over starts with
    a fresh memory.

    Event: `EvaluationEvents.EVALUATED` and `Events.EPOCH_COMPLETED`; `Events.STARTED` to stay
        stopped, `RunEvents.SAFE_POINT` to miss the metric.
    Cost: none that shows; it reads values that are on the host already.

    Args:
        metric: the name under which the values are published.
        patience: values without improvement that end the run, >= 1.
        mode: whether a larger ("max") or a smaller ("min") value is better.
        min_delta: what a value must be better by to improve, >= 0, in units of the metric.

    Attributes:
        best: the best value so far; None before the first.
        best_iteration: when it came.
        waited: values since then.
        stopped: whether the run was ended.

    Raises:
        ValueError: if an argument is out of range.
        KeyError: while running: if, when the metric should have come first, nothing has its name;
            the message lists the names that are there.
    """

    metric: str = "val/recall@1"
    patience: int = attrs.field(default=5, validator=whole_number())
    mode: Literal["max", "min"] = "max"
    min_delta: float = 0.0
    best: float | None = attrs.field(default=None, init=False)
    best_iteration: int = attrs.field(default=0, init=False)
    waited: int = attrs.field(default=0, init=False)
    stopped: bool = attrs.field(default=False, init=False)
    _judged: int = attrs.field(default=0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {self.mode!r}")
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"min_delta must be >= 0 and finite, got {self.min_delta!r}")

    def attach(self, trainer: Trainer) -> None:
        """Watch the trainer's values."""
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(EvaluationEvents.EVALUATED, self._look)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._look)
        trainer.add_event_handler(RunEvents.SAFE_POINT, self._check_metric)

    def reset(self) -> None:
        """Forget the best value and let a stopped run go on."""
        self.best, self.best_iteration, self.waited, self.stopped = None, 0, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Return the memory, as numbers."""
        names = ("best", "best_iteration", "waited", "stopped")
        return {**{name: getattr(self, name) for name in names}, "judged": self._judged}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a memory that `state_dict` returned."""
        self.best, self.best_iteration = state_dict["best"], state_dict["best_iteration"]
        self.waited, self.stopped = state_dict["waited"], state_dict["stopped"]
        self._judged = state_dict["judged"]

    def _start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0 and (self.stopped or self.best_iteration > 0):
            self.reset()
            self._judged = 0
        if self.stopped:
            logger.warning(
                "the run stays stopped: %s has not improved on %s for %d values; "
                "call reset() on its EarlyStopping to go on",
                self.metric,
                self.best,
                self.waited,
            )
            trainer.terminate()

    def _look(self, trainer: Trainer) -> None:
        history = published(trainer, self.metric)
        for value in history[self._judged :]:
            self._judge(trainer, value)
        self._judged = len(history)

    def _judge(self, trainer: Trainer, value: float) -> None:
        if self._improves(value):
            self.best, self.best_iteration = value, trainer.state.iteration
            self.waited = 0
            return
        self.waited += 1
        if self.waited >= self.patience and not self.stopped:
            self.stopped = True
            logger.info(
                "stopping at iteration %d: %s has not improved on %s of iteration %d for %d values",
                trainer.state.iteration,
                self.metric,
                self.best,
                self.best_iteration,
                self.waited,
            )
            trainer.terminate()

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return not math.isnan(value)
        gain = value - self.best if self.mode == "max" else self.best - value
        return gain > self.min_delta

    def _check_metric(self, trainer: Trainer) -> None:
        # After all handlers of the epoch's end, one of which may publish the metric.
        if self._judged == 0:
            self._look(trainer)
            missing = unpublished(trainer, "metric", self.metric)
            if missing is not None:
                raise KeyError(missing)
