"""Early stopping: the end of a run whose metric no longer improves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
from ignite.engine import Events

from diptych.engine.checks import whole_number
from diptych.engine.events import MetricsEvents, RunEvents
from diptych.engine.handler import Change, Handler
from diptych.engine.trainer import Trainer
from diptych.handlers.argument_checks import Mode, improves, not_negative, one_of, usual_mode
from diptych.handlers.cadence import call_before_first_batch
from diptych.handlers.evaluation.watched_metric import (
    check_name,
    check_published,
    is_evaluated,
    published_values,
    report_nan,
)

logger = logging.getLogger(__name__)

MEMORY = ("best", "best_iteration", "waited", "stopped")
"""The attributes that a checkpoint keeps."""


@attrs.define(kw_only=True, eq=False)
class EarlyStopping(Handler):
    """Ends the run once `patience` values of a metric in a row have not improved on the best.

    Every value counts once: for an evaluation's metric (`val/recall@1`), the value of each
    evaluation; for any other metric (`train/loss`), its mean over each epoch; for a value that only
    `trainer.state.metrics` holds, as an Ignite metric puts it there, the value at the end of each
    epoch. NaN counts as a value without an improvement, and each one is logged: `patience`
    of them in a row end the run too.

    A stopped run stays stopped. If it is continued, also from a checkpoint, it ends before its next
    iteration and logs a warning, unless `patience` was raised or `reset()` was called. A run that
    starts over starts with an empty memory.

    Event: `MetricsEvents.LOGGED`, `EPOCH_PUBLISHED` and `CUT_PUBLISHED`; `RunEvents.RESTORE` to
        forget an earlier run; `Events.STARTED` to stay stopped; a run's first
        `Events.GET_BATCH_STARTED` to report a metric that nothing can publish;
        `RunEvents.SAFE_POINT` to report one that is never published.
    Cost: none that can be measured; it reads values that are on the host already.

    Args:
        metric: the name under which the values are published.
        patience: values in a row without an improvement that end the run, >= 1.
        mode: whether a larger ("max") or a smaller ("min") value is better. Default: "min" for a
            name that ends in "loss", "mean_rank" or "median_rank", else "max", which is logged if
            the name does not say that more is better.
        min_delta: the least difference that counts as an improvement, >= 0, in units of the metric.

    Attributes:
        best: the best value so far; None before the first.
        best_iteration: its iteration.
        waited: values since then.
        stopped: whether this handler has ended the run.

    Raises:
        ValueError: if an argument is out of range.
        KeyError: when the run starts, if nothing attached can publish the metric, or while running,
            if nothing has by the time it was due; the message lists the metrics there are.
    """

    changes: ClassVar[frozenset[Change]] = frozenset({Change.RUN_LENGTH})

    metric: str = "val/recall@1"
    patience: int = attrs.field(default=5, validator=whole_number())
    mode: Mode = attrs.field(validator=one_of(Mode))
    min_delta: float = attrs.field(default=0.0, validator=not_negative)
    best: float | None = attrs.field(default=None, init=False)
    best_iteration: int = attrs.field(default=0, init=False)
    waited: int = attrs.field(default=0, init=False)
    stopped: bool = attrs.field(default=False, init=False)
    _judged: int = attrs.field(default=0, init=False, repr=False)

    @mode.default
    def _usual_mode(self) -> Mode:
        return usual_mode(self.metric, "metric")

    @property
    def role(self) -> str:
        """The metric."""
        return self.metric

    def attach(self, trainer: Trainer) -> None:
        """Judge the values that the trainer publishes."""
        trainer.add_event_handler(RunEvents.RESTORE, self._start_over)
        trainer.add_event_handler(Events.STARTED, self._start)
        call_before_first_batch(trainer, self._check_name)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._judge_new_values)
        for end in (MetricsEvents.EPOCH_PUBLISHED, MetricsEvents.CUT_PUBLISHED):
            trainer.add_event_handler(end, self._judge_end)
        trainer.add_event_handler(RunEvents.SAFE_POINT, self._check_published)

    def reset(self) -> None:
        """Forget the best value, and let a stopped run continue."""
        self.best, self.best_iteration, self.waited, self.stopped = None, 0, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Return the memory, as numbers."""
        return {**{name: getattr(self, name) for name in MEMORY}, "judged": self._judged}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a memory that `state_dict` returned."""
        for name in MEMORY:
            setattr(self, name, state_dict[name])
        self._judged = state_dict["judged"]

    def _start_over(self, trainer: Trainer) -> None:
        if trainer.state.max_epochs is None and trainer.state.max_iters is None:  # another run
            self.reset()
            self._judged = 0

    def _start(self, trainer: Trainer) -> None:
        if not is_evaluated(trainer, self.metric):
            trainer.waits_for_epoch(self)
        if trainer.state.iteration and not self._has_memory:  # it joins a run, and starts fresh
            self._judged = len(published_values(trainer, self.metric))
        if 0 < self.waited < self.patience:  # the script has raised it
            self.stopped = False
        if self.stopped:
            logger.warning(
                "EarlyStopping ends the run again: %s has not improved on %s for %d values. To "
                "continue, raise its patience, or call its reset().",
                self.metric,
                self.best,
                self.waited,
            )
            trainer.terminate()

    @property
    def _has_memory(self) -> bool:
        return bool(self._judged or self.waited or self.best is not None)

    def _check_name(self, trainer: Trainer) -> None:
        if not self._judged:
            check_name(trainer, "metric", self.metric)

    def _judge_new_values(self, trainer: Trainer) -> None:
        history = published_values(trainer, self.metric)
        for value in history[self._judged :]:
            self._judge(trainer, value)
        self._judged = len(history)

    def _judge_end(self, trainer: Trainer) -> None:
        """Judge the values of an epoch; also one that only `state.metrics` holds."""
        self._judge_new_values(trainer)
        value = trainer.state.metrics.get(self.metric)
        if isinstance(value, (int, float)) and not published_values(trainer, self.metric):
            self._judge(trainer, value)

    def _judge(self, trainer: Trainer, value: float) -> None:
        report_nan("EarlyStopping", self.metric, value, trainer.state.iteration)
        if improves(value, self.best, self.mode, self.min_delta):
            self.best, self.best_iteration = value, trainer.state.iteration
            self.waited = 0
            return
        self.waited += 1
        if self.waited >= self.patience and not self.stopped:
            self.stopped = True
            logger.info(
                "Stopping at iteration %d: %s has not improved on %s (iteration %d) for %d values.",
                trainer.state.iteration,
                self.metric,
                self.best,
                self.best_iteration,
                self.waited,
            )
            trainer.terminate()

    def _check_published(self, trainer: Trainer) -> None:
        if not self._has_memory:
            check_published(trainer, self.metric)
