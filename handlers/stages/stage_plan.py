"""Training in stages: what trains, at which rates and on what changes as a plan says."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import attrs
from ignite.engine import Events
from torch import Tensor

from diptych.engine.data.batch_source import length_of
from diptych.engine.data.seeded_loader import SeededLoader
from diptych.engine.errors import CheckpointError
from diptych.engine.events import EvaluationEvents, RunEvents
from diptych.engine.state.module_state import clean_state_dict, load_clean_state_dict
from diptych.engine.trainer import Trainer
from diptych.handlers.evaluation.evaluation import Evaluation, average_scored
from diptych.handlers.optimization.schedules import LearningRate, rate_of
from diptych.handlers.stages.attributes import try_attribute, write_attribute
from diptych.handlers.stages.stage import Stage
from diptych.handlers.stages.stage_chart import chart
from diptych.handlers.stages.stage_groups import StageGroups
from diptych.handlers.stages.stage_progress import StageProgress

logger = logging.getLogger(__name__)


def _as_stages(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    return tuple(stages)


def _check_stages(_: Any, __: attrs.Attribute[Any], stages: tuple[Stage, ...]) -> None:
    names = [stage.name for stage in stages]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"a StagePlan needs stages, each with a name of its own, got {names or 'none'}"
        )
    for before, stage in zip((None, *stages), stages, strict=False):
        if stage.load == "best" and (before is None or before.metric is None):
            raise ValueError(
                f"stage {stage.name!r} loads the best weights of the stage before, which needs a "
                f"metric, got {'no stage before' if before is None else 'none'}"
            )


@attrs.define(eq=False)
class StagePlan:
    """Trains in stages, one after the other; the plan decides how long the run is.

    ```python
    plan = StagePlan([
        Stage("projections", trains=["image.projection", "text.projection"], epochs=2, lr=1e-3),
        Stage("everything", epochs=10, lr=1e-4, schedule=LearningRate(warmup=100)),
    ])
    trainer.attach(plan)
    trainer.run(loader)
    ```

    Each stage begins with an epoch of its own. Then what it names trains and the rest is frozen
    (batch norms of frozen parts stay in eval mode), groups get its rates and options, its
    attributes are set, and its loader or batch size is taken. What a stage sets stays until another
    sets it. The optimizer's groups are made once, when this is attached, so fine that each has one
    rate in every stage.

    The plan sets the run's limit: `run(loader)` ends with the last stage, and `max_iters` is a cap.
    A patience counts the values of the metric that come within the stage. For a stage with
    `load="best"`, the stage before keeps a copy of the weights of model and loss where its metric
    was best, in memory and in checkpoints: of the averaged weights where the metric is a score of
    those.

    A run that was killed in a stage resumes in it: what trains, the optimizer, the schedule, the
    patience and the place in the data are those of a run that nobody touched.

    Published at log points: `train/stage`, counted from 1, `train/learning_rate`, the highest, and
    `train/learning_rate/<group>`.

    Event: `Events.EPOCH_STARTED` (a stage begins), `Events.ITERATION_STARTED` (rates, frozen
        norms), `Events.ITERATION_COMPLETED`, `Events.EPOCH_COMPLETED` and
        `EvaluationEvents.EVALUATED` (a stage ends), `Events.STARTED` (the plan is logged),
        `RunEvents.RESTORE`, `RunEvents.SAFE_POINT` (to miss a metric).
    Cost: some four microseconds an iteration with seven groups; where a best is kept, a copy of
        the weights at each improvement. No synchronisation.

    Args:
        stages: in their order.

    Attributes:
        progress: where the plan stands.

    Raises:
        ValueError: if stages have no names of their own, or `load` nothing to load; when attached,
            if a pattern matches nothing, a trained parameter is in no group or in two, a path of a
            setting names nothing, or the optimizer has several groups; when the run starts, if
            there is a `LearningRate` too, a warm-up is as long as its stage, or a decay has no end
            that is known.
        TypeError: when the run starts, if a batch size is for no `SeededLoader`.
        KeyError: while running: if a stage's metric is not published.
        CheckpointError: when resumed, if the checkpoint is of another plan.
    """

    stages: Sequence[Stage] = attrs.field(converter=_as_stages, validator=_check_stages)
    progress: StageProgress = attrs.field(factory=StageProgress, init=False)
    _kept: dict[str, dict[str, Tensor]] = attrs.field(factory=dict, init=False, repr=False)
    _trainer: Trainer | None = attrs.field(default=None, init=False, repr=False)
    _groups: StageGroups | None = attrs.field(default=None, init=False, repr=False)
    _loader: Iterable[Any] | None = attrs.field(default=None, init=False, repr=False)
    _task: Any = attrs.field(default=None, init=False, repr=False)
    _sizes: dict[SeededLoader, int] = attrs.field(factory=dict, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Check the plan against the trainer, and make the optimizer's groups."""
        if any(isinstance(other, StagePlan) for other in trainer.handlers):
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
        trainer.add_event_handler(EvaluationEvents.EVALUATED, self._look)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        trainer.add_event_handler(RunEvents.SAFE_POINT, self._check_metric)

    def describe(self) -> str:
        """Return the plan as text: stages, what trains, groups, rates and schedules.

        Raises:
            ValueError: if the plan is not attached.
        """
        lengths = [self._epoch_length(stage) for stage in self.stages]
        return chart(self.stages, self._attached()[1], lengths)

    @property
    def stage(self) -> Stage:
        """The stage that runs; before the run the first."""
        return self.stages[max(self.progress.index, 0)]

    def state_dict(self) -> dict[str, Any]:
        """Return where the plan stands, and the best weights where the next stage loads them."""
        return {
            "stages": [stage.name for stage in self.stages],
            "progress": attrs.asdict(self.progress),
            "kept": {part: dict(state) for part, state in self._kept.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned: freeze, set and load as its stage does.

        Raises:
            CheckpointError: if it is of a plan with other stages.
        """
        names = [stage.name for stage in self.stages]
        if state_dict["stages"] != names:
            raise CheckpointError(
                f"the checkpoint is of a plan with the stages {', '.join(state_dict['stages'])}, "
                f"got {', '.join(names)}"
            )
        self.progress = StageProgress(**state_dict["progress"])
        self._kept = {part: dict(state) for part, state in state_dict["kept"].items()}
        trainer, groups = self._attached()
        for stage in self.stages[: self.progress.index + 1]:
            self._set_attributes(trainer, stage)
        if self.progress.index >= 0:
            groups.freeze(self.progress.index)
        self._take_loader(trainer)

    def _attached(self) -> tuple[Trainer, StageGroups]:
        if self._trainer is None or self._groups is None:
            raise ValueError("a StagePlan must be attached to a trainer first, got none")
        return self._trainer, self._groups

    # -- the loader ------------------------------------------------------------------------------

    def _restore(self, trainer: Trainer) -> None:
        if trainer.state.max_epochs is None and trainer.state.max_iters is None:
            self.progress, self._kept = StageProgress(), {}  # the run starts over
        self._take_loader(trainer)

    def _take_loader(self, trainer: Trainer) -> None:
        """Remember the run's own loader, and put that of the running stage into its place."""
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
        """Return the loader of a stage, with the batch size that it has there."""
        loader = self._loader_of(stage)
        if isinstance(loader, SeededLoader):
            own = self._sizes.setdefault(loader, loader.batch_size)
            try:
                loader.batch_size = own if stage.batch_size is None else stage.batch_size
            except ValueError as error:
                raise ValueError(
                    f"the batch_size of stage {stage.name!r} must be one that its loader can fill: "
                    f"{error}"
                ) from error
        elif stage.batch_size is not None and loader is not None:
            raise TypeError(
                f"the batch_size of stage {stage.name!r} must be of a SeededLoader, got a "
                f"{type(loader).__name__}: give the stage a loader of its own"
            )
        return loader

    def _epoch_length(self, stage: Stage) -> int | None:
        """Return the batches of a pass in a stage; None without a loader that has a length."""
        length = length_of(self._sized(stage))
        if self.progress.index >= 0:
            self._sized(self.stage)
        elif isinstance(loader := self._loader_of(stage), SeededLoader):
            loader.batch_size = self._sizes[loader]
        return length

    def _change_loader(self, trainer: Trainer) -> None:
        """Take the batches of a stage that begins from its loader, with its batch size."""
        source, state = trainer.batches, trainer.state
        whole = state.epoch_length in {None, length_of(source.data)}
        loader = self._sized(self.stage)
        trainer.set_data(loader)
        source.rewind()
        if whole:
            state.epoch_length = length_of(loader)

    # -- a stage begins --------------------------------------------------------------------------

    def _start(self, trainer: Trainer) -> None:
        if any(isinstance(other, LearningRate) for other in trainer.handlers):
            raise ValueError(
                "the stages of a StagePlan have schedules of their own, got a LearningRate beside "
                "it: give each stage its schedule"
            )
        if trainer.state.iteration == 0:
            for stage in self.stages:
                length = self._epoch_length(stage)
                if length is not None:  # else when the stage begins
                    stage.check_schedule(length)
            logger.info("the plan:\n%s", self.describe())
        if self.progress.over and trainer.epoch_iteration:  # stopped where the stage had ended
            trainer.terminate_epoch()
        self._set_limit(trainer)

    def _start_epoch(self, trainer: Trainer) -> None:
        progress = self.progress
        if progress.index < 0 or (progress.over and progress.index + 1 < len(self.stages)):
            self._begin(trainer, progress.index + 1)
        self._set_limit(trainer)

    def _begin(self, trainer: Trainer, index: int) -> None:
        """Begin a stage with the epoch that has started."""
        _, groups = self._attached()
        stage = self.stages[index]
        self.progress = StageProgress(
            index,
            first_epoch=trainer.state.epoch,
            first_iteration=trainer.state.iteration,
            judged=len(_history(trainer, stage.metric)),
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
        logger.info("stage %d of %d begins: %s", index + 1, len(self.stages), stage.name)

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
        self._look(trainer)
        epochs = self.stage.epochs
        if epochs is not None and trainer.state.epoch == self.progress.first_epoch + epochs - 1:
            self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        self.progress.over = True
        if trainer.epoch_iteration != trainer.state.epoch_length:
            trainer.terminate_epoch()
        self._set_limit(trainer)

    def _set_limit(self, trainer: Trainer) -> None:
        """Let the run end with the last stage; before, the limit is the best guess."""
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
            if self.stage.steps is not None:  # epochs may be cut: the steps end it, not this
                last = max(last, state.epoch + 1)
        state.max_epochs = last + later

    # -- the metric ------------------------------------------------------------------------------

    def _look(self, trainer: Trainer) -> None:
        stage, progress = self.stage, self.progress
        if stage.metric is None or progress.index < 0:
            return
        history = _history(trainer, stage.metric)
        for value in history[progress.judged :]:
            progress.counted += 1
            progress.waited += 1
            if stage.improves(value, progress.best):
                progress.best, progress.waited = value, 0
                self._keep(trainer)
        progress.judged = len(history)
        if stage.patience is not None and progress.waited >= stage.patience and not progress.over:
            logger.info("stage %s ends: %s has not improved", stage.name, stage.metric)
            self._end(trainer)

    def _keep(self, trainer: Trainer) -> None:
        """Keep a copy of the weights where the next stage begins with the best ones."""
        following = self.stages[self.progress.index + 1 : self.progress.index + 2]
        if any(stage.load == "best" for stage in following):
            parts = {"model": trainer.model, "loss": trainer.loss}
            average = average_scored(trainer, str(self.stage.metric))
            with average.averaged() if average else nullcontext():
                self._kept = {
                    part: {key: value.clone() for key, value in clean_state_dict(module).items()}
                    for part, module in parts.items()
                }

    def _check_metric(self, trainer: Trainer) -> None:
        # After all handlers of the stage's first epoch, one of which may publish the metric.
        stage, progress = self.stage, self.progress
        if stage.metric is None or progress.counted or trainer.epoch_iteration:
            return
        own = [h for h in trainer.handlers if isinstance(h, Evaluation)]
        later = any(stage.metric.startswith(f"{evaluation.prefix}/") for evaluation in own)
        there = len(_history(trainer, stage.metric)) > progress.judged
        if not there and (not later or progress.over):
            raise KeyError(
                f"the metric of stage {stage.name!r} must be one that is published within it, "
                f"got {stage.metric!r}; there are "
                f"{', '.join(sorted(trainer.state.metrics)) or 'none'}"
            )


def _history(trainer: Trainer, metric: str | None) -> list[float]:
    try:
        return [] if metric is None else trainer.metrics.get_history(metric)
    except KeyError:
        return []
