"""StagePlan: trains in stages, each with its own trained parameters, rates, loss and data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import attrs
from ignite.engine import Events
from torch import Tensor

from diptych.engine.data.loader_contract import length_of
from diptych.engine.data.seeded_loader import SeededLoader
from diptych.engine.errors import CheckpointError, UnknownNameError
from diptych.engine.evaluator import EvaluatesModel
from diptych.engine.events import EvaluationEvents, MetricsEvents, RunEvents
from diptych.engine.handler import Change, Handler
from diptych.engine.optimizers.optimizer_modes import evaluation_weights
from diptych.engine.state.module_state import clean_state_dict, load_clean_state_dict
from diptych.engine.trainer import Trainer
from diptych.engine.trials.trial import Trial
from diptych.handlers.evaluation.watched_metric import average_behind, published_values
from diptych.handlers.optimization.horizon import log_other_length
from diptych.handlers.optimization.schedules import LearningRate, rate_of
from diptych.handlers.stages.attribute_paths import try_attribute, write_attribute
from diptych.handlers.stages.stage import Stage
from diptych.handlers.stages.stage_chart import plan_as_text
from diptych.handlers.stages.stage_groups import StageGroups

logger = logging.getLogger(__name__)


def _as_stages(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    found = tuple(stages)
    wrong = [type(stage).__name__ for stage in found if not isinstance(stage, Stage)]
    if wrong:
        raise TypeError(f"stages must be Stage objects, got a {wrong[0]}. Write Stage('name', ...)")
    return found


def _check_stages(_: Any, __: attrs.Attribute[Any], stages: tuple[Stage, ...]) -> None:
    names = [stage.name for stage in stages]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a StagePlan needs stages with different names, got {names or 'none'}")
    for before, stage in zip((None, *stages), stages, strict=False):
        if stage.load == "best" and (before is None or before.metric is None):
            raise ValueError(
                f"stage {stage.name!r} loads the best weights of the previous stage, which needs a "
                f"metric, got {'no previous stage' if before is None else 'none'}"
            )


@attrs.define
class StageProgress:
    """The progress of a plan.

    Attributes:
        index: the running stage, counted from 0; -1 before the first.
        over: whether that stage has ended; the next one starts with the next epoch.
        first_epoch: the number of the stage's first epoch.
        first_iteration: iterations before the stage.
        total: the largest number of iterations of the stage; None if unknown.
        judged: judged values of the stage's metric, including those before the stage.
        counted: values of the metric since the stage started.
        waited: values since the best one.
        best: the best value; None before the first.
    """

    index: int = -1
    over: bool = False
    first_epoch: int = 0
    first_iteration: int = 0
    total: int | None = None
    judged: int = 0
    counted: int = 0
    waited: int = 0
    best: float | None = None


@attrs.define(eq=False)
class StagePlan(Handler):
    """Trains in stages, one after the other; the plan determines the length of the run.

    ```python
    plan = StagePlan([
        Stage("projections", trains=["image.projection", "text.projection"], epochs=2, lr=1e-3),
        Stage("everything", epochs=10, lr=1e-4, schedule=LearningRate(warmup=100)),
    ])
    trainer.attach(plan)
    trainer.run(loader)
    ```

    Each stage starts with a new epoch. It freezes all parameters that it does not train (batch
    norms of frozen parts stay in eval mode), sets the rates and options of the groups and its
    attributes, and uses its loader or batch size. An attribute keeps its value until another stage
    sets it. The optimizer's groups are made once, when this handler is attached, so fine that all
    parameters of a group have the same rate in every stage. A group that something else adds
    during the run keeps its own options and rate.

    The plan sets the length of the run: `run(loader)` ends with the last stage, and `max_iters` is
    an upper limit. A patience counts the values of the metric within the stage. If the next stage
    has `load="best"`, the plan keeps a copy of the weights of model and loss at the best metric, in
    memory and in checkpoints; of the averaged weights if the metric is a score of those.

    A run that was killed in a stage resumes in it, and continues as if it had not been interrupted.

    Published at log points: `train/stage`, counted from 1, `train/learning_rate`, the highest rate,
    and `train/learning_rate/<group>`.

    Event: `Events.STARTED` (logs the plan), `Events.EPOCH_STARTED` (starts a stage),
        `Events.ITERATION_STARTED` (sets rates and modes), `Events.ITERATION_COMPLETED`,
        `EvaluationEvents.EVALUATED` and `MetricsEvents.EPOCH_PUBLISHED` (end a stage),
        `RunEvents.RESTORE`.
    Cost: about four microseconds an iteration with seven groups; if the best weights are kept, a
        copy of the weights at each improvement. No synchronisation.

    Args:
        stages: the stages, in order.

    Attributes:
        progress: the progress of the plan.

    Raises:
        ValueError: if two stages have the same name, or there is nothing for `load`; when attached,
            if a pattern matches nothing, a trained parameter is in no group or in two, the path of
            a setting does not exist, or the optimizer has several groups; when the run starts, if
            there is a `LearningRate` too, a warm-up is not shorter than its stage, or the end of a
            decay is unknown.
        TypeError: when the run starts, if a stage has a batch size and no `SeededLoader`.
        KeyError: while running: if nothing publishes the metric of a stage.
        CheckpointError: on resume, if the checkpoint belongs to another plan.
    """

    changes: ClassVar[frozenset[Change]] = frozenset(Change) - {Change.RANDOM_STATE}

    stages: Sequence[Stage] = attrs.field(converter=_as_stages, validator=_check_stages)
    progress: StageProgress = attrs.field(factory=StageProgress, init=False)
    _kept: dict[str, dict[str, Tensor]] = attrs.field(factory=dict, init=False, repr=False)
    _trainer: Trainer | None = attrs.field(default=None, init=False, repr=False)
    _groups: StageGroups | None = attrs.field(default=None, init=False, repr=False)
    _loader: Iterable[Any] | None = attrs.field(default=None, init=False, repr=False)
    _task: Any = attrs.field(default=None, init=False, repr=False)
    _sizes: dict[SeededLoader, int] = attrs.field(factory=dict, init=False, repr=False)

    def for_trial(self, trial: Trial) -> StagePlan:
        """Return a plan whose stages are one short epoch each; join the optimizer's groups."""
        if self._trainer is not None and self._groups is not None:
            self._groups.remove(self._trainer.optimizer)
        return trial.rebuilt(self, stages=[stage.for_trial(trial) for stage in self.stages])

    def attach(self, trainer: Trainer) -> None:
        """Check the plan against the trainer, and replace the optimizer's groups."""
        if trainer.handlers_of(StagePlan):
            raise ValueError("a trainer must have one StagePlan, got a second one")
        for stage in self.stages:
            for path, value in stage.assignments.items():
                try_attribute(trainer, path, value)
        groups = StageGroups(trainer, self.stages)
        groups.install(trainer.optimizer)
        self._trainer, self._groups, self._task = trainer, groups, trainer.task
        trainer.metrics.gauge("train/stage", lambda: self.progress.index + 1)
        rates = [rate_of(trainer, number) for number in range(len(groups.groups))]
        trainer.metrics.gauge("train/learning_rate", lambda: max(rate() for rate in rates))
        for group, rate in zip(groups.groups, rates, strict=True):
            trainer.metrics.gauge(f"train/learning_rate/{group.name}", rate)
        trainer.add_event_handler(RunEvents.RESTORE, self._restore)
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._start_iteration)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._count_steps)
        trainer.add_event_handler(EvaluationEvents.EVALUATED, self._judge_metric)
        trainer.add_event_handler(MetricsEvents.EPOCH_PUBLISHED, self._end_epoch)
        trainer.add_event_handler(MetricsEvents.CUT_PUBLISHED, self._judge_metric)

    def describe(self) -> str:
        """Return the plan as text: trained parameters, groups, rates and schedules of each stage.

        Raises:
            ValueError: if the plan is not attached.
        """
        lengths = [self._epoch_length(stage) for stage in self.stages]
        return plan_as_text(self.stages, self._attached()[1], lengths)

    @property
    def stage(self) -> Stage:
        """The running stage; before the run, the first one."""
        return self.stages[max(self.progress.index, 0)]

    def state_dict(self) -> dict[str, Any]:
        """Return the progress, and the best weights if the next stage loads them."""
        return {
            "stages": [stage.name for stage in self.stages],
            "progress": attrs.asdict(self.progress),
            "kept": {part: dict(state) for part, state in self._kept.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned: freeze and set what its stage does.

        Raises:
            CheckpointError: if it belongs to a plan with other stages.
        """
        names = [stage.name for stage in self.stages]
        if state_dict["stages"] != names:
            raise CheckpointError(
                "the stages of a plan must be the checkpoint's, "
                f"{', '.join(state_dict['stages'])}, got {', '.join(names)}"
            )
        self.progress = StageProgress(**state_dict["progress"])
        self._kept = {part: dict(state) for part, state in state_dict["kept"].items()}
        trainer, groups = self._attached()
        for stage in self.stages[: self.progress.index + 1]:
            self._set_attributes(trainer, stage)
        if self.progress.index >= 0:
            groups.freeze(self.progress.index)
        self._replace_loader(trainer)

    def _attached(self) -> tuple[Trainer, StageGroups]:
        if self._trainer is None or self._groups is None:
            raise ValueError("a StagePlan must be attached to a trainer, got none")
        return self._trainer, self._groups

    # -- the loader ------------------------------------------------------------------------------

    def _restore(self, trainer: Trainer) -> None:
        if trainer.state.max_epochs is None and trainer.state.max_iters is None:
            self.progress, self._kept = StageProgress(), {}  # the run starts over
        self._replace_loader(trainer)

    def _replace_loader(self, trainer: Trainer) -> None:
        """Remember the run's own loader, and replace it by that of the running stage."""
        given = trainer.state.dataloader
        if given is not None and all(given is not stage.loader for stage in self.stages):
            self._loader = given
        if self.progress.index >= 0 and self._loader_of(self.stage) is not None:
            trainer.state.dataloader = self._sized(self.stage)
        elif isinstance(given, SeededLoader):
            given.batch_size = self._sizes.get(given, given.batch_size)

    def _loader_of(self, stage: Stage) -> Iterable[Any] | None:
        return self._loader if stage.loader is None else stage.loader

    def _sized(self, stage: Stage) -> Iterable[Any] | None:
        """Return the loader of a stage, with the stage's batch size."""
        loader = self._loader_of(stage)
        if isinstance(loader, SeededLoader):
            own = self._sizes.setdefault(loader, loader.batch_size)
            try:
                loader.batch_size = own if stage.batch_size is None else stage.batch_size
            except ValueError as error:
                raise ValueError(
                    f"the batch_size of stage {stage.name!r} must fit its loader: {error}"
                ) from error
        elif stage.batch_size is not None and loader is not None:
            raise TypeError(
                f"the batch_size of stage {stage.name!r} needs a SeededLoader, got a "
                f"{type(loader).__name__}. Give the stage its own loader"
            )
        return loader

    def _epoch_length(self, stage: Stage) -> int | None:
        """Return the batches of a pass in a stage; None if its loader has no length."""
        length = length_of(self._sized(stage))
        if self.progress.index >= 0:
            self._sized(self.stage)
        elif isinstance(loader := self._loader_of(stage), SeededLoader):
            loader.batch_size = self._sizes[loader]
        return length

    def _change_loader(self, trainer: Trainer) -> None:
        """Switch to the loader and batch size of the stage that starts."""
        source, state = trainer.batches, trainer.state
        whole = state.epoch_length in {None, length_of(source.data)}
        loader = self._sized(self.stage)
        trainer.set_data(loader)
        source.rewind()
        if whole:
            state.epoch_length = length_of(loader)

    # -- a stage starts --------------------------------------------------------------------------

    def _start(self, trainer: Trainer) -> None:
        if trainer.handlers_of(LearningRate):
            raise ValueError(
                "a StagePlan replaces LearningRate, got both. Pass LearningRate as the schedule of "
                "a stage"
            )
        if trainer.state.iteration == 0:
            for stage in self.stages:
                length = self._epoch_length(stage)
                if length is not None:  # otherwise when the stage starts
                    stage.check_schedule(length)
            logger.info("StagePlan with %d stages:\n%s", len(self.stages), self.describe())
        self._log_other_length(trainer)
        if self.progress.over and trainer.epoch_iteration:  # saved after the end of the stage
            trainer.terminate_epoch()
        self._set_limit(trainer)

    def _log_other_length(self, trainer: Trainer) -> None:
        """Log that the script has changed the length of the running stage, not of its schedule."""
        stage, before = self.stage, self.progress.total
        length = stage.length(trainer.state.epoch_length)
        fixed = stage.schedule.total is not None or stage.schedule.decay == "constant"
        if trainer.state.iteration and not fixed and length is not None and before is not None:
            name = f"learning rate of stage {stage.name}"
            log_other_length(before, length, "its LearningRate", name)

    def _start_epoch(self, trainer: Trainer) -> None:
        progress = self.progress
        if progress.index < 0 or (progress.over and progress.index + 1 < len(self.stages)):
            self._begin(trainer, progress.index + 1)
        self._set_limit(trainer)

    def _begin(self, trainer: Trainer, index: int) -> None:
        """Start a stage in the epoch that has started."""
        _, groups = self._attached()
        stage = self.stages[index]
        self.progress = StageProgress(
            index,
            first_epoch=trainer.state.epoch,
            first_iteration=trainer.state.iteration,
            judged=len(published_values(trainer, stage.metric or "")),
        )
        self._change_loader(trainer)
        self.progress.total = stage.length(trainer.state.epoch_length)
        stage.check_schedule(trainer.state.epoch_length)
        if stage.load == "best" and self._kept:
            load_clean_state_dict(trainer.model, self._kept["model"])
            load_clean_state_dict(trainer.loss, self._kept["loss"])
        self._kept = {}
        if stage.optimizer_state == "reset":
            trainer.optimizer.state.clear()
        groups.freeze(index)
        groups.set_options(trainer.optimizer, index)
        self._set_attributes(trainer, stage)
        logger.info("Stage %d of %d (%s) starts.", index + 1, len(self.stages), stage.name)

    def _set_attributes(self, trainer: Trainer, stage: Stage) -> None:
        trainer.task = self._task if stage.task is None else stage.task
        for path, value in stage.assignments.items():
            write_attribute(trainer, path, value)

    def _start_iteration(self, trainer: Trainer) -> None:
        _, groups = self._attached()
        progress, schedule = self.progress, self.stage.schedule
        step = trainer.state.iteration - progress.first_iteration
        factor = schedule.factor(step, schedule.total or progress.total)
        groups.set_rates(trainer.optimizer, progress.index, factor)
        groups.keep_frozen_norms()

    # -- a stage ends ----------------------------------------------------------------------------

    def _count_steps(self, trainer: Trainer) -> None:
        done = trainer.state.iteration - self.progress.first_iteration
        if self.stage.steps is not None and done >= self.stage.steps:
            self._end(trainer)

    def _end_epoch(self, trainer: Trainer) -> None:
        self._judge_metric(trainer)
        epochs = self.stage.epochs
        if epochs is not None and trainer.state.epoch == self.progress.first_epoch + epochs - 1:
            self._end(trainer)
        self._check_metric(trainer)

    def _end(self, trainer: Trainer) -> None:
        self.progress.over = True
        if trainer.epoch_iteration != trainer.state.epoch_length:
            trainer.terminate_epoch()
        self._set_limit(trainer)

    def _set_limit(self, trainer: Trainer) -> None:
        """End the run with the last stage; before that, set the limit to the best estimate."""
        progress, state = self.progress, trainer.state
        finished = progress.over and progress.index + 1 == len(self.stages)
        if state.max_iters is not None:
            if finished:
                state.max_iters = state.iteration
            return
        later = sum(s.epochs_of(self._epoch_length(s)) for s in self.stages[progress.index + 1 :])
        last = state.epoch
        if progress.index >= 0 and not progress.over:
            last = progress.first_epoch - 1 + self.stage.epochs_of(state.epoch_length)
            if self.stage.steps is not None:  # the steps end the stage, not this limit
                last = max(last, state.epoch + 1)
        state.max_epochs = last + later

    # -- the metric ------------------------------------------------------------------------------

    def _judge_metric(self, trainer: Trainer) -> None:
        stage, progress = self.stage, self.progress
        if stage.metric is None or progress.index < 0:
            return
        values = published_values(trainer, stage.metric)
        for value in values[progress.judged :]:
            progress.counted += 1
            progress.waited += 1
            if stage.improves(value, progress.best):
                progress.best, progress.waited = value, 0
                self._keep(trainer)
        progress.judged = len(values)
        if stage.patience is not None and progress.waited >= stage.patience and not progress.over:
            logger.info(
                "Stage %s ends: %s has not improved for %d values.",
                stage.name,
                stage.metric,
                progress.waited,
            )
            self._end(trainer)

    def _keep(self, trainer: Trainer) -> None:
        """Keep a copy of the weights if the next stage loads the best ones."""
        following = self.stages[self.progress.index + 1 : self.progress.index + 2]
        if any(stage.load == "best" for stage in following):
            parts = {"model": trainer.model, "loss": trainer.loss}
            average = average_behind(trainer, str(self.stage.metric))
            held = average.averaged() if average else nullcontext()
            with evaluation_weights(*trainer.optimizers), held:
                self._kept = {
                    part: {key: value.clone() for key, value in clean_state_dict(module).items()}
                    for part, module in parts.items()
                }

    def _check_metric(self, trainer: Trainer) -> None:
        """Check after an epoch of a stage that its metric is published, or still may be."""
        metric, progress = self.stage.metric, self.progress
        if metric is None or progress.counted:
            return
        evaluations = trainer.handlers_of(EvaluatesModel)
        is_to_come = any(metric.startswith(f"{handler.prefix}/") for handler in evaluations)
        if progress.over or not is_to_come:
            raise UnknownNameError(
                f"the metric of stage {self.stage.name!r} must be published within the stage, got "
                f"{metric!r}; there are {', '.join(sorted(trainer.state.metrics)) or 'none'}"
            )
