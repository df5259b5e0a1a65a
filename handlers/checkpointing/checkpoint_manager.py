"""Saves a run and resumes it, so that an interruption changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import attrs
from ignite.engine import Events

from diptych.engine.checks import whole_number
from diptych.engine.distributed.agreement import on_rank_zero
from diptych.engine.distributed.collectives import rank
from diptych.engine.errors import CheckpointError
from diptych.engine.events import EvaluationEvents, MetricsEvents, RunEvents
from diptych.engine.handler import Handler
from diptych.engine.state.resume_changes import WhenChanged
from diptych.engine.trainer import Trainer
from diptych.engine.trials.trial import Trial
from diptych.handlers.argument_checks import Mode, one_of, usual_mode
from diptych.handlers.cadence import call_before_first_batch, is_cadence
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.checkpoint_writer import CheckpointWriter
from diptych.handlers.checkpointing.directory_saver import DirectorySaver, is_safe
from diptych.handlers.checkpointing.entries import Ranking
from diptych.handlers.checkpointing.resume import resume_limits
from diptych.handlers.checkpointing.run_savers import RunSavers
from diptych.handlers.evaluation.watched_metric import average_behind, check_name
from diptych.handlers.extras import check_extra
from diptych.handlers.run_directory import absolute

logger = logging.getLogger(__name__)


def _check_every(_: Any, __: attrs.Attribute[Any], value: object) -> None:
    is_positive = isinstance(value, timedelta) and value > timedelta()
    if not (is_positive or is_cadence(value)):
        raise ValueError(
            f"every must be 'epoch', a number of iterations >= 1 or a timedelta > 0, got {value!r}"
        )


def _check_changes(_: Any, __: attrs.Attribute[Any], value: object) -> None:
    if value not in get_args(WhenChanged):
        raise ValueError(f"changes must be 'apply' or 'refuse', got {value!r}")


@attrs.define(eq=False)
class CheckpointManager(Handler):
    """Saves the whole run on a cadence, keeps the latest and the best checkpoints, and resumes.

    A checkpoint holds everything that the rest of the run depends on: model, loss, optimizer,
    scaler, position, metrics so far, the state of every attached handler, the position in the data,
    and the random generators. It loads with `weights_only=True`.

    The end of a run is saved whatever the cadence, so that the last weights are kept and a larger
    `max_epochs` continues from them.

    On SIGTERM, SIGINT and SIGUSR1 the run finishes its iteration, saves, logs it and ends with the
    conventional exit code; an evaluation ends with its batch, and is repeated when the run resumes.
    A second signal ends the process at once. A failed save is logged as an
    error and tried again at the next save; earlier checkpoints stay intact. If the last save of a
    run fails, the run ends with the error.

    Several managers of one trainer, such as one for the best and one for the latest checkpoints,
    resume from the newest checkpoint of all their directories. Each keeps its own ranking.

    With several ranks rank 0 writes, all ranks read, and all resume from the same checkpoint: every
    rank must see the directory. The states of handlers are those of rank 0. If the model is
    sharded, each rank writes its shards into a folder beside the file; any number of ranks can
    resume from it.

    If a handler raises at the end of an epoch, or in an evaluation, the weights are saved, in one
    process; the run resumes with that handler. A run whose process was killed in `COMPLETED` fires
    that event again when it resumes.

    Event: `RunEvents.SAFE_POINT` (saves), `RunEvents.RESTORE` (resumes); `COMPLETED`, `TERMINATE`
        and `INTERRUPT` (save the end); `EvaluationEvents.BATCH_EVALUATED` (signals) and
        `EXCEPTION_RAISED`. Fires `RunEvents.SAVED`.
    Cost: one comparison an iteration between two saves. A save copies the state, writes it to the
        disk and reads it once. With `background` the run waits only for the copy, whose host memory
        the next save uses again.

    Args:
        directory: the folder of this run's checkpoints, relative to the working directory at
            construction. One process (with its ranks) uses it at a time.
        every: "epoch", iterations, or a `datetime.timedelta` between two saves. Inside an epoch a
            run can be resumed if the loader has `state_dict()` and `load_state_dict()`, as
            `SeededLoader` and torchdata's have; with another loader, saves wait for the end of the
            epoch.
        best: the metric that ranks the checkpoints in the directory; each new value is saved with
            the run. A value that is NaN is not ranked. A run that starts from a checkpoint of
            another directory starts a new ranking, and logs the best one there.
        mode: whether a larger ("max") or a smaller ("min") value is better. Default: "min" for a
            name that ends in "loss", "mean_rank" or "median_rank", else "max", which is logged if
            the name does not say that more is better.
        keep: checkpoints to keep: with `best`, the best ones and also the latest; without it, the
            latest ones.
        resume: "auto" continues from the latest checkpoint in the directory if there is one. The
            path of another run's checkpoint is used if the directory is still empty. A path (or
            file name) in the directory goes back to that checkpoint in each run. None starts a new
            run, in an empty directory; with several managers, this one has nothing to resume from.
        changes: what happens if the script differs from the saved run: "apply" continues with the
            script's values and logs each change, "refuse" raises an error.
        background: whether a thread writes while the run continues.
        export: whether to write the weights of each new best checkpoint (without `best`, of each
            checkpoint) to `model.safetensors` too. Needs the extra `safetensors`.

    Raises:
        ValueError, TypeError: if an argument is out of range or of another type.
        ImportError: if `export` is True and the extra is not installed.
        ValueError: when the run starts, if `export` is True and `best` scores averaged weights.
        CheckpointError: when the run starts, if managers name different checkpoints; while running:
            see `save_checkpoint` and `load_checkpoint`.
    """

    collective: ClassVar[bool] = True

    directory: Path = attrs.field(converter=absolute)
    every: int | timedelta | Literal["epoch"] = attrs.field(
        default="epoch", validator=_check_every, kw_only=True
    )
    best: str | None = attrs.field(default=None, kw_only=True)
    mode: Mode = attrs.field(validator=one_of(Mode), kw_only=True)
    keep: int = attrs.field(default=3, validator=whole_number(of="checkpoints"), kw_only=True)
    resume: Path | str | None = attrs.field(
        default="auto",
        validator=attrs.validators.instance_of((str, Path, type(None))),
        kw_only=True,
    )
    background: bool = attrs.field(default=False, kw_only=True)
    export: bool = attrs.field(default=False, kw_only=True)
    _when_changed: WhenChanged = attrs.field(
        default="apply", validator=_check_changes, kw_only=True, alias="changes"
    )
    _trainer: Trainer | None = attrs.field(default=None, init=False, repr=False)
    _store: CheckpointStore = attrs.field(init=False, repr=False)
    _saver: DirectorySaver = attrs.field(init=False, repr=False)
    _savers: RunSavers | None = attrs.field(default=None, init=False, repr=False)

    @mode.default
    def _usual_mode(self) -> Mode:
        return usual_mode(self.best, "best")

    def __attrs_post_init__(self) -> None:
        if self.export:
            check_extra("safetensors", "safetensors", needed_by="export=True")
        if self.resume not in {None, "auto"} and Path(str(self.resume)).parent != Path():
            self.resume = absolute(str(self.resume))
        self._store = CheckpointStore(self.directory)
        ranking = Ranking(self.best, self.mode, self.keep)
        writer = CheckpointWriter(
            self._store, ranking, background=self.background, export=self.export
        )
        self._saver = DirectorySaver(self._store, ranking, self.every, writer)

    @property
    def role(self) -> str:
        """The ranking metric; for a second manager of that metric, also the directory's name."""
        role, managers = self.best or "", managers_of(self._trainer) if self._trainer else []
        first = min((one.directory for one in managers if one.best == self.best), default=None)
        # Not the order of attachment: another script may have another.
        return role if first in {None, self.directory} else f"{role} {self.directory.name}".strip()

    def for_trial(self, trial: Trial) -> CheckpointManager:
        """Return a copy that saves a new run into the trial's directory."""
        return trial.rebuilt(self, resume=None)

    def attach(self, trainer: Trainer) -> None:
        """Save at the trainer's safe points and at its end; resume before a run starts."""
        self._trainer = trainer
        trainer.add_event_handler(RunEvents.RESTORE, self._restore)
        trainer.add_event_handler(Events.STARTED, self._start)
        call_before_first_batch(trainer, self._check_name)
        if self.every == "epoch":
            trainer.add_event_handler(MetricsEvents.EPOCH_PUBLISHED, self._make_due)
        elif isinstance(self.every, int):
            trainer.every(self.every, self._make_due)
        trainer.add_event_handler(RunEvents.SAFE_POINT, self._at_safe_point)
        trainer.add_event_handler(EvaluationEvents.BATCH_EVALUATED, self._in_evaluation)
        trainer.add_event_handler(Events.EXCEPTION_RAISED, self._at_exception)
        for end in (Events.TERMINATE, Events.INTERRUPT, Events.COMPLETED):
            trainer.add_event_handler(end, self._save_end)
        trainer.add_event_handler(RunEvents.ENDED, self._release)

    def save_checkpoint(self, epoch: int, metrics: Mapping[str, float]) -> Path:
        """Save the run; a checkpoint that is saved in this way is never removed.

        Outside of a run, and in a handler of `SAFE_POINT`, `STARTED`, `TERMINATE`, `INTERRUPT`,
        `COMPLETED` and `ENDED`, the file is written before the call returns. Inside any other event
        a part of an update, or of an epoch's end, is still to come: the file is written at the next
        safe point, or at the end of the run, and an error is logged as that of any other save.

        Args:
            epoch: the epoch for the file's name.
            metrics: values to keep with the checkpoint; `load_checkpoint` returns them.

        Returns:
            The file.

        Raises:
            CheckpointError: if the manager is not attached or the file cannot be written; earlier
                checkpoints stay intact.
        """
        trainer = self._attached()
        if self._saver.is_open and not is_safe(trainer):
            return self._saver.request(trainer, epoch, metrics)
        with self._saver.locked(trainer):
            self._saver.submit(trainer, epoch, metrics, by_hand=True)
            return self.directory / on_rank_zero(self._saver.writer.finish)

    def load_checkpoint(self, path: Path | str) -> tuple[int, dict[str, float]]:
        """Load a checkpoint into the trainer and everything that is attached to it.

        Args:
            path: a file that `save_checkpoint` returned, or its name in the directory.

        Returns:
            The epoch and the metrics that it was saved with.

        Raises:
            CheckpointError: if the file is missing, damaged, or of another model.
            ResumeError: if it was saved inside an epoch and the trainer's loader cannot go there.
        """
        path, savers = Path(path), _savers_of(self._attached())
        start = savers.read(self.directory / path.name if path.parent == Path() else path)
        savers.load(start)
        return start.state["saved"]["epoch"], dict(start.state["saved"]["metrics"])

    def get_latest_checkpoint(self) -> Path | None:
        """Return the complete checkpoint from which a run would resume, or None."""
        return self._saver.latest()

    def get_best_checkpoint(self) -> Path | None:
        """Return the complete checkpoint with the best score, or None."""
        return self._saver.best()

    def _attached(self) -> Trainer:
        if self._trainer is None:
            raise CheckpointError("a CheckpointManager must be attached to a trainer first")
        return self._trainer

    # -- events ----------------------------------------------------------------------------------

    def _restore(self, trainer: Trainer) -> None:
        """Open the directories of all managers and resume; the first manager does it for all."""
        managers = managers_of(trainer)
        if managers[0] is not self:
            return
        savers = _savers_of(trainer)
        for manager in managers:
            manager._savers = savers  # noqa: SLF001 - of this class
        savers.open()
        if not trainer.state.iteration:  # else another `run` of this process continues
            savers.resume([manager.resume for manager in managers])

    def _start(self, trainer: Trainer) -> None:
        if self.export and self.best and average_behind(trainer, self.best) is not None:
            raise ValueError(
                f"export must be False if best is a score of averaged weights, as {self.best} is, "
                "got export=True. Export the average with WeightAverage.export, or evaluate the "
                "trained weights with Evaluation(weights='model')."
            )
        if trainer.state.iteration == 0:
            self._saver.start_over()
        if self.every == "epoch":
            trainer.waits_for_epoch(self)
        limits = resume_limits(trainer, epochs_only=self.every == "epoch")
        if limits is not None and rank() == 0:
            logger.warning("%s", limits)

    def _check_name(self, trainer: Trainer) -> None:
        if self.best is not None:
            check_name(trainer, "best", self.best, CheckpointError)

    def _make_due(self, _: Trainer) -> None:
        self._saver.make_due()

    def _at_safe_point(self, _: Trainer) -> None:
        if self._savers is not None:
            self._savers.at_safe_point(self._saver)

    def _in_evaluation(self, _: Trainer) -> None:
        if self._savers is not None and self._savers.savers[-1] is self._saver:
            self._savers.in_evaluation()

    def _at_exception(self, _: Trainer, error: BaseException) -> None:
        if self._savers is not None and self._savers.savers[0] is self._saver:
            self._savers.at_exception(error)

    def _save_end(self, _: Trainer) -> None:
        if self._savers is not None:
            self._savers.save_end(self._saver)

    def _release(self, _: Trainer) -> None:
        if self._savers is not None and self._savers.savers[-1] is self._saver:
            self._savers.close()

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the ranking metric and mode, and how many of its values have been judged."""
        return {"scored": self._saver.state.values, "best": self.best, "mode": self.mode}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned; ignore another metric's count."""
        values = state_dict["scored"] if state_dict.get("best") == self.best else None
        self._saver.state = self._saver.state._replace(values=values)


def managers_of(trainer: Trainer) -> list[CheckpointManager]:
    """Return the managers that are attached to a trainer, in order."""
    owners = (listener.owner for listener in trainer.listeners)
    return list(dict.fromkeys(o for o in owners if isinstance(o, CheckpointManager)))


def _savers_of(trainer: Trainer) -> RunSavers:
    """Return the savers of all managers of a trainer."""
    managers = managers_of(trainer)
    refuse = any(manager._when_changed == "refuse" for manager in managers)  # noqa: SLF001
    return RunSavers(
        trainer,
        [manager._saver for manager in managers],  # noqa: SLF001
        changes="refuse" if refuse else "apply",
        kind=CheckpointManager.__name__,
    )
