"""ReduceOnPlateau: lower learning rates once a metric no longer improves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import attrs
from ignite.engine import Events
from torch.optim.lr_scheduler import ReduceLROnPlateau

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank
from diptych.engine.events import EvaluationEvents, MetricsEvents, RunEvents
from diptych.engine.handler import Change, Handler, contract_of
from diptych.engine.trainer import Trainer
from diptych.handlers.argument_checks import Mode, not_negative, number, one_of
from diptych.handlers.cadence import call_before_first_batch
from diptych.handlers.evaluation.watched_metric import (
    check_name,
    check_published,
    published_values,
    report_nan,
)
from diptych.handlers.optimization.schedules import publish_rates

logger = logging.getLogger(__name__)

ThresholdMode = Literal["rel", "abs"]

MEMORY = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
"""The attributes of torch's scheduler that a checkpoint keeps; the others are settings."""


@attrs.define(kw_only=True, eq=False)
class ReduceOnPlateau(Handler):
    """Multiplies the learning rates by a factor once a metric has not improved for a while.

    ```python
    trainer.attach(Evaluation(held_out), ReduceOnPlateau(metric="val/loss", factor=0.5, patience=3))
    ```

    The rule is that of torch's `ReduceLROnPlateau`. Every value of the metric counts once: for an
    evaluation's metric (`val/loss`), the value of each evaluation; for any other (`train/loss`),
    its mean over each epoch. NaN counts as a value without an improvement, and each one is logged.
    All groups of the optimizer are reduced, those added later included. The rates are part of the
    optimizer's state, and the values so far part of this handler's: a resumed run continues as the
    uninterrupted one. `train/learning_rate` is published at each log point, as `LearningRate` does.

    Event: `EvaluationEvents.EVALUATED` and `MetricsEvents.EPOCH_PUBLISHED`; a run's first
        `Events.GET_BATCH_STARTED` to report a metric that nothing can publish;
        `RunEvents.SAFE_POINT` to report one that is never published.
    Cost: none that can be measured; it reads values that are on the host already.

    Args:
        metric: the name under which the values are published.
        mode: whether a larger ("max") or a smaller ("min") value is better.
        factor: new rate over old rate, in (0, 1).
        patience: values in a row without an improvement that are tolerated; the next one reduces.
        threshold: the least change that counts as an improvement, >= 0.
        threshold_mode: whether the threshold is a share of the best value ("rel") or in units of
            the metric ("abs").
        cooldown: values after a reduction that do not count.
        min_lr: the smallest rate, >= 0.

    Raises:
        ValueError: if an argument is out of range; when the run starts, if another handler sets the
            rates too (`LearningRate`, `StagePlan`).
        KeyError: while running: if nothing has published the metric by the time it was due.
    """

    changes: ClassVar[frozenset[Change]] = frozenset({Change.RATES})

    metric: str = "val/loss"
    mode: Mode = attrs.field(default="min", validator=one_of(Mode))
    factor: float = attrs.field(
        default=0.1, validator=number("lie in (0, 1)", lambda value: 0 < value < 1)
    )
    patience: int = attrs.field(default=10, validator=whole_number(0, of="values"))
    threshold: float = attrs.field(default=1e-4, validator=not_negative)
    threshold_mode: ThresholdMode = attrs.field(default="rel", validator=one_of(ThresholdMode))
    cooldown: int = attrs.field(default=0, validator=whole_number(0, of="values"))
    min_lr: float = attrs.field(default=0.0, validator=not_negative)
    _scheduler: ReduceLROnPlateau = attrs.field(init=False, repr=False)
    _judged: int = attrs.field(default=0, init=False, repr=False)

    @property
    def role(self) -> str:
        """The metric."""
        return self.metric

    def attach(self, trainer: Trainer) -> None:
        """Judge the values that the trainer publishes, and reduce its optimizer's rates."""
        self._start_over(trainer)
        publish_rates(trainer)
        trainer.add_event_handler(Events.STARTED, self._start)
        call_before_first_batch(trainer, self._check_name)
        trainer.add_event_handler(EvaluationEvents.EVALUATED, self._judge_new_values)
        trainer.add_event_handler(MetricsEvents.EPOCH_PUBLISHED, self._judge_new_values)
        trainer.add_event_handler(RunEvents.SAFE_POINT, self._check_published)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the counts, as numbers."""
        memory = {name: getattr(self._scheduler, name) for name in MEMORY}
        return {**memory, "judged": self._judged}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        for name in MEMORY:
            setattr(self._scheduler, name, state_dict[name])
        self._judged = state_dict["judged"]

    def _start_over(self, trainer: Trainer) -> None:
        self._scheduler = ReduceLROnPlateau(
            trainer.optimizer,
            self.mode,
            factor=self.factor,
            patience=self.patience,
            threshold=self.threshold,
            threshold_mode=self.threshold_mode,
            cooldown=self.cooldown,
            min_lr=self.min_lr,
        )
        self._judged = 0

    def _start(self, trainer: Trainer) -> None:
        others = [one for one in trainer.handlers if one is not self]
        setters = [type(one).__name__ for one in others if Change.RATES in contract_of(one).changes]
        if setters:
            raise ValueError(
                "ReduceOnPlateau must be the only handler that sets the learning rates, got "
                f"{' and '.join(setters)} too. Attach one of them"
            )
        if trainer.state.iteration == 0:
            self._start_over(trainer)
        elif not self._judged:  # it joins a run, and starts fresh
            self._judged = len(published_values(trainer, self.metric))

    def _check_name(self, trainer: Trainer) -> None:
        if not self._judged:
            check_name(trainer, "metric", self.metric)

    def _judge_new_values(self, trainer: Trainer) -> None:
        history = published_values(trainer, self.metric)
        groups = trainer.optimizer.param_groups
        for value in history[self._judged :]:
            report_nan("ReduceOnPlateau", self.metric, value, trainer.state.iteration)
            before = [float(group["lr"]) for group in groups]
            self._scheduler.step(value)
            after = [float(group["lr"]) for group in groups]
            if after != before and rank() == 0:
                logger.info(
                    "The learning rate is %g instead of %g after iteration %d: %s has not improved "
                    "on %g for more than %d values.",
                    after[0],
                    before[0],
                    trainer.state.iteration,
                    self.metric,
                    self._scheduler.best,
                    self.patience,
                )
        self._judged = len(history)

    def _check_published(self, trainer: Trainer) -> None:
        if not self._judged:
            check_published(trainer, self.metric)
