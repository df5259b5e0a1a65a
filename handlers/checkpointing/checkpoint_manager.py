"""Saves a run and resumes it, so that an interruption changes nothing."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import torch.distributed as dist
from ignite.engine import Events

from diptych.engine.checks import whole_number
from diptych.engine.distributed.agreement import LaggedMaximum, on_all_ranks, on_rank_zero
from diptych.engine.distributed.collectives import exchange_timeout, rank, world_size
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.errors import CheckpointError, ResumeError
from diptych.engine.events import MetricsEvents, RunEvents
from diptych.engine.handler import Handler
from diptych.engine.state.run_state import load_run_state, run_state
from diptych.engine.trainer import Trainer
from diptych.handlers.cadence import is_cadence
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.checkpoint_writer import CheckpointWriter
from diptych.handlers.checkpointing.entries import SUFFIX, Entry, Ranking, resumable_entries
from diptych.handlers.checkpointing.resume import (
    check_is_empty,
    position_is_lost,
    read_latest,
    resume_limits,
)
from diptych.handlers.checkpointing.run_lock import RunLock
from diptych.handlers.checkpointing.save_policy import (
    RunStatus,
    SaveDecision,
    SaveState,
    decide_at_end,
    decide_at_safe_point,
)
from diptych.handlers.checkpointing.stop_signals import StopSignals
from diptych.handlers.evaluation.watched_metric import (
    average_behind,
    missing_metric,
    published_values,
)
from diptych.handlers.extras import check_extra

logger = logging.getLogger(__name__)


def _check_every(_: Any, __: attrs.Attribute[Any], value: object) -> None:
    is_positive = isinstance(value, timedelta) and value > timedelta()
    if not (is_positive or is_cadence(value)):
        raise ValueError(
            f"every must be 'epoch', a number of iterations >= 1 or a timedelta > 0, got {value!r}"
        )


def _absolute(path: Path | str) -> Path:
    return Path(path).absolute()  # the working directory may change later


@attrs.define(eq=False)
class CheckpointManager(Handler):
    """Saves the whole run on a cadence, keeps the latest and the best checkpoints, and resumes.

    A checkpoint holds everything that the rest of the run depends on: model, loss, optimizer,
    scaler, position, metrics so far, the state of every attached handler, the position in the data,
    and the random generators. It loads with `weights_only=True`.

    The end of a run is saved whatever the cadence, so that the last weights are kept and a larger
    `max_epochs` continues from them.

    On SIGTERM, SIGINT and SIGUSR1 the run finishes its iteration, saves, logs it and ends with the
    conventional exit code. A second signal ends the process at once. A failed save is logged as an
    error and tried again at the next save; earlier checkpoints stay intact. If the last save of a
    run fails, the run ends with the error.

    With several ranks rank 0 writes, all ranks read, and all resume from the same checkpoint: every
    rank must see the directory. The states of handlers are those of rank 0. If the model is
    sharded, each rank writes its shards into a folder beside the file; any number of ranks can
    resume from it.

    Event: `RunEvents.SAFE_POINT` (saves), `RunEvents.RESTORE` (resumes); `COMPLETED`, `TERMINATE`
        and `INTERRUPT` (save the end). Fires `RunEvents.SAVED`.
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
        best: the metric that ranks the checkpoints; each new value is saved with the run. A value
            that is NaN is not ranked.
        mode: whether a larger ("max") or a smaller ("min") value is better.
        keep: checkpoints to keep: with `best`, the best ones and also the latest; without it, the
            latest ones.
        resume: "auto" continues from the latest checkpoint in the directory if there is one. The
            path of another run's checkpoint is used if the directory is still empty. A path (or
            file name) in the directory goes back to that checkpoint in each run. None starts a new
            run, in an empty directory.
        background: whether a thread writes while the run continues.
        export: whether to write the weights of each new best checkpoint (without `best`, of each
            checkpoint) to `model.safetensors` too. Needs the extra `safetensors`.

    Raises:
        ValueError, TypeError: if an argument is out of range or of another type.
        ImportError: if `export` is True and the extra is not installed.
        ValueError: when the run starts, if `export` is True and `best` scores averaged weights.
        CheckpointError: while running: see `save_checkpoint` and `load_checkpoint`.
    """

    collective: ClassVar[bool] = True

    directory: Path = attrs.field(converter=_absolute)
    every: int | timedelta | Literal["epoch"] = attrs.field(
        default="epoch", validator=_check_every, kw_only=True
    )
    best: str | None = attrs.field(default=None, kw_only=True)
    mode: Literal["max", "min"] = attrs.field(
        default="max", validator=attrs.validators.in_(("max", "min")), kw_only=True
    )
    keep: int = attrs.field(default=3, validator=whole_number(of="checkpoints"), kw_only=True)
    resume: Path | str | None = attrs.field(
        default="auto",
        validator=attrs.validators.instance_of((str, Path, type(None))),
        kw_only=True,
    )
    background: bool = attrs.field(default=False, kw_only=True)
    export: bool = attrs.field(default=False, kw_only=True)
    _trainer: Trainer | None = attrs.field(default=None, init=False, repr=False)
    _store: CheckpointStore = attrs.field(init=False, repr=False)
    _writer: CheckpointWriter = attrs.field(init=False, repr=False)
    _lock: RunLock = attrs.field(init=False, repr=False)
    _ranking: Ranking = attrs.field(init=False, repr=False)
    _signals: StopSignals = attrs.field(factory=StopSignals, init=False, repr=False)
    _ranks: LaggedMaximum = attrs.field(factory=LaggedMaximum, init=False, repr=False)
    _group: Any = attrs.field(default=None, init=False, repr=False)
    _save_state: SaveState = attrs.field(default=SaveState(), init=False, repr=False)
    _deadline: float = attrs.field(default=math.inf, init=False, repr=False)
    _asleep: bool = attrs.field(default=False, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.export:
            check_extra("safetensors", "safetensors", needed_by="export=True")
        if self.resume not in {None, "auto"} and Path(str(self.resume)).parent != Path():
            self.resume = _absolute(str(self.resume))
        self._store = CheckpointStore(self.directory)
        self._ranking = Ranking(self.best, self.mode, self.keep)
        self._writer = CheckpointWriter(
            self._store, self._ranking, background=self.background, export=self.export
        )
        self._lock = RunLock(self.directory)

    def attach(self, trainer: Trainer) -> None:
        """Save at the trainer's safe points and at its end; resume before a run starts."""
        self._trainer = trainer
        trainer.add_event_handler(RunEvents.RESTORE, self._restore)
        trainer.add_event_handler(Events.STARTED, self._start)
        if self.every == "epoch":
            trainer.add_event_handler(MetricsEvents.EPOCH_PUBLISHED, self._make_due)
        elif isinstance(self.every, int):
            trainer.every(self.every, self._make_due)
        trainer.add_event_handler(RunEvents.SAFE_POINT, self._at_safe_point)
        for end in (Events.TERMINATE, Events.INTERRUPT, Events.COMPLETED):
            trainer.add_event_handler(end, self._save_end)
        trainer.add_event_handler(RunEvents.ENDED, self._release)

    # -- saving and loading by hand --------------------------------------------------------------

    def save_checkpoint(self, epoch: int, metrics: Mapping[str, float]) -> Path:
        """Save the run now and wait until it is written.

        Args:
            epoch: the epoch for the file's name.
            metrics: values to keep with the checkpoint; `load_checkpoint` returns them.

        Returns:
            The file.

        Raises:
            CheckpointError: if the manager is not attached or the file cannot be written; earlier
                checkpoints stay intact.
        """
        self._submit(epoch, metrics, by_hand=True)
        return self.directory / on_rank_zero(self._writer.finish)

    def _submit(self, epoch: int, metrics: Mapping[str, float], *, by_hand: bool) -> None:
        """Pass the state of the run to the writer."""
        trainer = self._attached()
        state = {**run_state(trainer), "saved": {"epoch": epoch, "metrics": dict(metrics)}}
        inside = f"_iteration_{trainer.state.iteration}" if trainer.epoch_iteration else ""
        score = metrics.get(self.best) if self.best else None
        entry = Entry(
            file=f"checkpoint_epoch_{epoch}{inside}{SUFFIX}",
            epoch=epoch,
            iteration=trainer.state.iteration,
            metrics=dict(metrics),
            score=score,
            scored_by=None if score is None else self.best,
            resumable=not position_is_lost(trainer),
            by_hand=by_hand,
        )
        self._asleep = False
        group = self._shard_group()
        if rank() == 0 or group is not None:
            self._writer.submit(entry, state, group)
        trainer.fire_event(RunEvents.SAVED)

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
        path = Path(path)
        store = self._store if path.parent == Path() else CheckpointStore(path.parent)
        state = on_all_ranks(partial(store.read, path.name, self._shard_group()))
        self._load(store.directory / path.name, state)
        return state["saved"]["epoch"], dict(state["saved"]["metrics"])

    def _load(self, path: Path, state: Mapping[str, Any]) -> None:
        trainer = self._attached()
        try:
            load_run_state(trainer, state)
        except (CheckpointError, ResumeError) as error:
            raise type(error)(f"checkpoint {path}: {error}") from error
        logger.info(
            "Resumed from %s (epoch %d, iteration %d).",
            path,
            trainer.state.epoch,
            trainer.state.iteration,
        )

    def get_latest_checkpoint(self) -> Path | None:
        """Return the complete checkpoint from which a run would resume, or None."""
        entries = resumable_entries(self._store.entries())
        return self.directory / entries[0].file if entries else None

    def get_best_checkpoint(self) -> Path | None:
        """Return the complete checkpoint with the best score, or None."""
        ranked = self._ranking.ranked(self._store.entries()) if self.best else []
        return self.directory / ranked[0].file if ranked else None

    def _attached(self) -> Trainer:
        if self._trainer is None:
            raise CheckpointError("a CheckpointManager must be attached to a trainer first")
        return self._trainer

    def _shard_group(self) -> Any:
        """Return the process group for saving a sharded model, made at the first use; or None."""
        if has_shards(self._attached().model) and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=exchange_timeout())
        return self._group

    # -- the start of a run ----------------------------------------------------------------------

    def _restore(self, trainer: Trainer) -> None:
        self._signals.install()
        self._ranks.open()
        self._set_deadline()
        self._asleep = False
        on_rank_zero(self._acquire_directory)
        if trainer.state.iteration:  # another `run` of this process continues
            return
        self._save_state = self._save_state._replace(saved=None)
        entries = on_rank_zero(self._store.entries)
        if self.resume is None:
            check_is_empty(self.directory, entries)
        elif self.resume != "auto" and (self._goes_back() or not resumable_entries(entries)):
            self.load_checkpoint(self.resume)
        else:
            self._resume_latest(resumable_entries(entries))

    def _acquire_directory(self) -> None:
        self._lock.acquire(self._attached())
        self._store.sweep()
        self._writer.export_if_outdated()

    def _goes_back(self) -> bool:
        """Return whether `resume` is a path in the run's own directory."""
        return Path(str(self.resume)).parent in {Path(), self.directory}

    def _resume_latest(self, entries: list[Entry]) -> None:
        found = read_latest(self._store, entries, self._shard_group())
        if found is not None:
            self._load(*found)
            self._save_state = self._save_state._replace(saved=_position(self._attached()))
            if found[0].name == entries[0].file:  # after a damaged one, older ones are needed
                on_rank_zero(self._writer.remove_superfluous)

    def _start(self, trainer: Trainer) -> None:
        if self.export and self.best and average_behind(trainer, self.best) is not None:
            raise ValueError(
                f"export must be False if best is a score of averaged weights, as {self.best} is, "
                "got export=True. Export the average with WeightAverage.export, or evaluate the "
                "trained weights with Evaluation(weights='model')."
            )
        if trainer.state.iteration == 0:
            self._save_state = self._save_state._replace(saved=None)
        if self._save_state.values is None:
            self._save_state = self._save_state._replace(values=len(self._scores(trainer)))
        limits = resume_limits(trainer, epochs_only=self.every == "epoch")
        if limits is not None and rank() == 0:
            logger.warning("%s", limits)

    def _release(self, _: Trainer) -> None:
        self._writer.wait()
        self._ranks.close()
        self._lock.release()
        self._signals.remove()

    # -- the decision to save --------------------------------------------------------------------

    def _make_due(self, _: Trainer) -> None:
        self._save_state = self._save_state._replace(due=True)
        self._asleep = False

    def _at_safe_point(self, trainer: Trainer) -> None:
        if self._asleep and not self._signals.number:
            return
        self._writer.log_failure()
        timeouts = self._save_state.timeouts + (time.monotonic() >= self._deadline)
        signal, timeouts = self._ranks.exchange(self._signals.number, timeouts)
        status = self._run_status(trainer, signal, timeouts)
        self._carry_out(trainer, decide_at_safe_point(self._save_state, status))
        # Until something wakes it, only a signal can cause a save: skip the decision.
        self._asleep = (
            self.best is None
            and not isinstance(self.every, timedelta)
            and not self._save_state.due
            and self._writer.idle
            and world_size() == 1
        )

    def _save_end(self, trainer: Trainer) -> None:
        status = self._run_status(trainer, save_failed=on_rank_zero(self._last_save_failed))
        self._carry_out(trainer, decide_at_end(self._save_state, status))
        on_rank_zero(self._writer.finish)
        # The exchange lags by one call: the second call returns the maximum of the first.
        self._ranks.exchange(self._signals.number, 0)
        signal, _ = self._ranks.exchange(self._signals.number, 0)
        self._carry_out(trainer, SaveDecision(self._save_state, signal=signal))

    def _run_status(
        self, trainer: Trainer, signal: int = 0, timeouts: int = 0, *, save_failed: bool = False
    ) -> RunStatus:
        values, missing = self._scores(trainer), None
        if self.best is not None and not values:
            missing = missing_metric(trainer, "best", self.best)
        at = _position(trainer)
        lost = position_is_lost(trainer)
        finished = trainer.is_finished
        return RunStatus(at, finished, lost, signal, timeouts, values, missing, save_failed)

    def _scores(self, trainer: Trainer) -> list[float]:
        return [] if self.best is None else published_values(trainer, self.best)

    def _last_save_failed(self) -> bool:
        self._writer.wait()
        return self._writer.log_failure()

    def _carry_out(self, trainer: Trainer, decision: SaveDecision) -> None:
        self._save_state = decision.state
        if decision.save:
            self._save(trainer, decision.score)
        if decision.missing is not None:
            on_rank_zero(self._writer.finish)
            raise CheckpointError(decision.missing)
        if decision.signal:
            self._leave(decision.signal)

    def _save(self, trainer: Trainer, score: float | None) -> None:
        self._set_deadline()
        metrics = {
            k: float(v) for k, v in trainer.state.metrics.items() if isinstance(v, (int, float))
        }
        if self.best is not None:
            metrics.pop(self.best, None)  # it may be an older value, of other weights
            metrics.update({} if score is None else {self.best: score})
        self._submit(trainer.state.epoch, metrics, by_hand=False)

    def _set_deadline(self) -> None:
        if isinstance(self.every, timedelta):
            self._deadline = time.monotonic() + self.every.total_seconds()

    def _leave(self, signal: int) -> None:
        """End this process once the last save is on the disk; all ranks wait for it."""
        on_rank_zero(self._writer.finish)
        latest = on_rank_zero(self.get_latest_checkpoint)
        if rank() == 0:
            logger.warning("Signal %d ends the run here. It resumes from %s.", signal, latest)
        raise self._signals.answer(signal)

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the ranking metric, and how many of its values have been judged."""
        return {"scored": self._save_state.values, "best": self.best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned; ignore another metric's count."""
        same = state_dict.get("best") == self.best
        self._save_state = self._save_state._replace(values=state_dict["scored"] if same else None)


def _position(trainer: Trainer) -> tuple[int, int]:
    return trainer.state.iteration, trainer.epoch_iteration
