"""Saves a run, and resumes it, so that an interruption changes nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch.distributed as dist
from ignite.engine import Events

from diptych.engine.checks import is_whole, whole_number
from diptych.engine.distributed.agreement import LaggedMaximum, on_all_ranks, on_rank_zero
from diptych.engine.distributed.collectives import exchange_timeout, rank, world_size
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.errors import CheckpointError, ResumeError
from diptych.engine.events import RunEvents
from diptych.engine.state.run_state import load_run_state, run_state
from diptych.handlers.checkpointing.entries import Entry, Ranking, resumable
from diptych.handlers.checkpointing.export import check_can_export, check_exports_what_is_scored
from diptych.handlers.checkpointing.resume import read_latest, refuse_to_mix
from diptych.handlers.checkpointing.run_lock import RunLock
from diptych.handlers.checkpointing.stop_signals import StopSignals
from diptych.handlers.checkpointing.store import SUFFIX, CheckpointStore
from diptych.handlers.checkpointing.writer import CheckpointWriter
from diptych.handlers.run_progress import (
    moment,
    place_is_lost,
    published,
    unpublished,
    where_it_resumes,
)

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)


def _check_every(_: Any, __: attrs.Attribute[Any], value: object) -> None:
    long = isinstance(value, timedelta) and value > timedelta()
    if value != "epoch" and not is_whole(value) and not long:
        raise ValueError(
            f"every must be 'epoch', a number of iterations >= 1 or a timedelta, got {value!r}"
        )


def _absolute(path: Path | str) -> Path:
    return Path(path).absolute()  # the process may go to another folder later


@attrs.define(eq=False)
class CheckpointManager:
    """Saves the whole run on a cadence, keeps the latest and the best, and resumes.

    A checkpoint holds all that the rest of the run depends on: model, loss, optimizer, scaler,
    position, metrics so far, every attached handler that has a state, the place in the data, and
    the random generators. It loads with `weights_only=True`.

    The end of a run is saved whatever the cadence, so that its last weights are there and a larger
    `max_epochs` goes on from them.

    On SIGTERM, SIGINT and SIGUSR1 the run finishes its iteration, saves, says so and ends with the
    conventional exit code; a second signal ends it at once. A save that fails is logged as an
    error and tried again at the next one; the checkpoints before it stand. Where the last save of
    a run failed, the run ends with the error.

    Over several ranks rank 0 writes, all read, and all resume from the same checkpoint: the folder
    must be one that all can see. The states of handlers are rank 0's. Of a sharded model each rank
    writes its share, into a folder beside the file; any number of ranks can resume it.

    Event: `RunEvents.SAFE_POINT` (saves), `RunEvents.RESTORE` (resumes); `COMPLETED`, `TERMINATE`
        and `INTERRUPT` for the end. Fires `RunEvents.SAVED`.
    Cost: one comparison an iteration between two saves. A save copies the state, writes it to the
        disk and reads it once; with `background` the run waits for the copy only, which stays in
        host memory for the next one.

    Args:
        directory: of this run's checkpoints; one process (and its ranks) at a time has it. The
            folder that it is when the manager is made, wherever the process goes later.
        every: "epoch", iterations, or a `datetime.timedelta` between two saves. Inside an epoch a
            run can be resumed with a loader that has `state_dict()` and `load_state_dict()`
            (`SeededLoader`, torchdata's); with any other, saves wait for the end of the epoch.
        best: the metric by which checkpoints are ranked; each new value is saved with the run. A
            value that is NaN ranks nowhere.
        mode: whether a larger ("max") or a smaller ("min") value is better.
        keep: checkpoints to keep: with `best`, the best ones and the latest besides; without, the
            latest.
        resume: "auto" continues from the latest checkpoint in the directory, where there is one. A
            path of another run's checkpoint is where a run begins whose directory is empty yet; a
            path (or a file's name) in the directory goes back to that checkpoint, each time. None
            starts anew, in an empty directory.
        background: whether a thread writes while the run goes on.
        export: whether each new best checkpoint (each checkpoint, without `best`) also gives
            `model.safetensors`, the weights alone. Needs the extra `safetensors`.

    Raises:
        ValueError, TypeError: if an argument is out of range, or something else.
        ImportError: if `export` is asked for without the extra.
        ValueError: when the run starts, if `export` would write the trained weights, and `best` is
            a score of averaged ones.
        CheckpointError: while running: see `save_checkpoint` and `load_checkpoint`.
    """

    directory: Path = attrs.field(converter=_absolute)
    every: int | timedelta | Literal["epoch"] = attrs.field(
        default="epoch", validator=_check_every, kw_only=True
    )
    best: str | None = attrs.field(default=None, kw_only=True)
    mode: Literal["max", "min"] = attrs.field(
        default="max", validator=attrs.validators.in_(("max", "min")), kw_only=True
    )
    keep: int = attrs.field(
        default=3,
        validator=whole_number(of="checkpoints"),
        kw_only=True,
    )
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
    _shards: Any = attrs.field(default=None, init=False, repr=False)
    _scored: int | None = attrs.field(default=0, init=False, repr=False)
    _due: bool = attrs.field(default=False, init=False, repr=False)
    _saved: tuple[int, int] | None = attrs.field(default=None, init=False, repr=False)
    _saved_at: float = attrs.field(default=0.0, init=False, repr=False)
    _timed: int = attrs.field(default=0, init=False, repr=False)
    _waits: bool = attrs.field(default=False, init=False, repr=False)
    _asleep: bool = attrs.field(default=False, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.export:
            check_can_export()
        if self.resume not in {None, "auto"} and Path(str(self.resume)).parent != Path():
            self.resume = _absolute(str(self.resume))
        self._store = CheckpointStore(self.directory)
        self._ranking = Ranking(self.best, self.mode, self.keep)
        self._writer = CheckpointWriter(
            self._store, self._ranking, background=self.background, export=self.export
        )
        self._lock = RunLock(self.directory)

    def attach(self, trainer: Trainer) -> None:
        """Save on the trainer's safe points, and resume before its run is decided."""
        self._trainer = trainer
        trainer.add_event_handler(RunEvents.RESTORE, self._restore)
        trainer.add_event_handler(Events.STARTED, self._start)
        if self.every == "epoch":
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self._fall_due)
        elif isinstance(self.every, int):
            trainer.every(self.every, self._fall_due)
        trainer.add_event_handler(RunEvents.SAFE_POINT, self._at_safe_point)
        for end in (Events.TERMINATE, Events.INTERRUPT, Events.COMPLETED):
            trainer.add_event_handler(end, self._finish)
        trainer.add_event_handler(RunEvents.RELEASE, self._release)

    def save_checkpoint(self, epoch: int, metrics: Mapping[str, float]) -> Path:
        """Save the run now, by hand, and wait for it.

        Args:
            epoch: goes into the file's name.
            metrics: kept with the checkpoint; `load_checkpoint` returns them.

        Returns:
            The file.

        Raises:
            CheckpointError: if nothing is attached yet, or the file cannot be written; the
                checkpoints before it stand.
        """
        self._submit(epoch, metrics, by_hand=True)
        return self.directory / on_rank_zero(self._writer.end)

    def _submit(self, epoch: int, metrics: Mapping[str, float], *, by_hand: bool) -> None:
        """Give a save to the writer."""
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
            resumable=not place_is_lost(trainer),
            by_hand=by_hand,
        )
        self._asleep = False
        ranks = self._ranks_of_shards()
        if rank() == 0 or ranks is not None:
            self._writer.submit(entry, state, ranks)
        trainer.fire_event(RunEvents.SAVED)

    def load_checkpoint(self, path: Path | str) -> tuple[int, dict[str, float]]:
        """Put the attached trainer, and all that is attached to it, into the state of a checkpoint.

        Args:
            path: a file that `save_checkpoint` returned, or its name in the directory.

        Returns:
            The epoch and the metrics that it was saved with.

        Raises:
            CheckpointError: if the file is missing, damaged, or of another model.
            ResumeError: if it stands inside an epoch and the trainer's loader cannot go there.
        """
        path = Path(path)
        store = self._store if path.parent == Path() else CheckpointStore(path.parent)
        state = on_all_ranks(partial(store.read, path.name, self._ranks_of_shards()))
        self._load(store.directory / path.name, state)
        return state["saved"]["epoch"], dict(state["saved"]["metrics"])

    def _load(self, path: Path, state: Mapping[str, Any]) -> None:
        try:
            load_run_state(self._attached(), state)
        except (CheckpointError, ResumeError) as error:
            raise type(error)(f"checkpoint {path}: {error}") from error
        logger.info("resumed %s", path)

    def get_latest_checkpoint(self) -> Path | None:
        """Return the complete checkpoint that a run would resume from, or None."""
        entries = resumable(self._store.entries())
        return self.directory / entries[0].file if entries else None

    def get_best_checkpoint(self) -> Path | None:
        """Return the complete checkpoint with the best score, or None."""
        ranked = self._ranking.ranked(self._store.entries()) if self.best else []
        return self.directory / ranked[0].file if ranked else None

    def _attached(self) -> Trainer:
        if self._trainer is None:
            raise CheckpointError("a CheckpointManager must be attached to a trainer first")
        return self._trainer

    def _ranks_of_shards(self) -> Any:
        """Return the group over which a sharded model is saved, made at the first use; or None."""
        if has_shards(self._attached().model) and self._shards is None:
            self._shards = dist.new_group(backend="gloo", timeout=exchange_timeout())
        return self._shards

    def _restore(self, trainer: Trainer) -> None:
        self._signals.install()
        self._ranks.open()
        self._saved_at = time.monotonic()
        # Then nothing but what it is told decides whether it saves: nobody is asked each iteration.
        timed = isinstance(self.every, timedelta)
        self._waits = world_size() == 1 and self.best is None and not timed
        self._asleep = False
        on_rank_zero(self._take_directory)
        if trainer.state.iteration:  # a run that goes on in this process
            return
        self._saved = None
        entries = on_rank_zero(self._store.entries)
        if self.resume is None:
            refuse_to_mix(self.directory, entries)
        elif self.resume != "auto" and (self._goes_back() or not resumable(entries)):
            self.load_checkpoint(self.resume)
        else:
            self._resume_latest(resumable(entries))

    def _take_directory(self) -> None:
        self._lock.acquire()
        self._store.sweep()
        self._writer.export_what_a_kill_left_out()

    def _release(self, _: Trainer) -> None:
        self._writer.wait()
        self._ranks.close()
        self._lock.release()
        self._signals.remove()

    def _resume_latest(self, entries: list[Entry]) -> None:
        found = read_latest(self._store, entries, self._ranks_of_shards())
        if found is not None:
            self._load(*found)
            self._saved = moment(self._attached())

    def _goes_back(self) -> bool:
        """Say whether the run is to resume from a path in its own directory."""
        parent = Path(str(self.resume)).parent
        return parent in {Path(), self.directory}

    def _start(self, trainer: Trainer) -> None:
        if self.export and self.best:
            check_exports_what_is_scored(trainer, self.best)
        if trainer.state.iteration == 0:
            self._saved = None
        if self._scored is None:
            self._scored = len(published(trainer, self.best or ""))
        told = where_it_resumes(trainer, epochs_only=self.every == "epoch")
        if told is not None and rank() == 0:
            logger.warning("%s", told)

    def _fall_due(self, _: Trainer) -> None:
        self._due, self._asleep = True, False

    def _at_safe_point(self, trainer: Trainer) -> None:
        if self._asleep and not self._signals.number:
            return
        self._look(trainer)
        self._asleep = self._waits and self._writer.idle and not self._due

    def _look(self, trainer: Trainer) -> None:
        self._writer.tell_failure()
        number, timed = self._ranks.exchange(self._signals.number, self._timed + self._time_is_up())
        self._due |= timed > self._timed
        self._timed = max(timed, self._timed)
        if trainer.is_finished:  # its last log point is still to come; `_finish` saves
            return
        score = self._new_score(trainer)
        missing = unpublished(trainer, "best", self.best) if self.best else None
        asked = self._due or number > 0 or missing is not None
        if score is not None or (asked and not place_is_lost(trainer)):
            self._save(trainer, score)
        if missing is not None:
            on_rank_zero(self._writer.end)
            raise CheckpointError(missing)
        if number:
            self._leave(number)

    def _time_is_up(self) -> bool:
        if not isinstance(self.every, timedelta):
            return False
        return time.monotonic() - self._saved_at >= self.every.total_seconds()

    def _save(self, trainer: Trainer, score: float | None) -> None:
        self._saved_at = time.monotonic()
        self._saved = moment(trainer)
        self._due = self._due and place_is_lost(trainer)
        metrics = {
            k: float(v) for k, v in trainer.state.metrics.items() if isinstance(v, (int, float))
        }
        if self.best is not None:
            metrics.pop(self.best, None)  # it may be an older value, of other weights
            metrics.update({} if score is None else {self.best: score})
        self._submit(trainer.state.epoch, metrics, by_hand=False)

    def _finish(self, trainer: Trainer) -> None:
        if on_rank_zero(lambda: self._is_unsaved(trainer)):
            self._save(trainer, self._new_score(trainer))
        on_rank_zero(self._writer.end)
        missing = (
            unpublished(trainer, "best", self.best) if self.best and trainer.is_finished else None
        )
        if missing is not None:
            raise CheckpointError(missing)
        self._ranks.exchange(self._signals.number, 0)  # the next call tells what this one gives
        number, _ = self._ranks.exchange(self._signals.number, 0)
        if number:
            self._leave(number)

    def _is_unsaved(self, trainer: Trainer) -> bool:
        self._writer.wait()
        return self._writer.tell_failure() or self._saved != moment(trainer)

    def _leave(self, number: int) -> None:
        """End this process, when the last save is on the disk: all ranks wait for it."""
        on_rank_zero(self._writer.end)
        latest = on_rank_zero(self.get_latest_checkpoint)
        if rank() == 0:
            logger.warning("signal %d: the run ends here; it resumes from %s", number, latest)
        raise self._signals.answer(number)

    def _new_score(self, trainer: Trainer) -> float | None:
        """Return the value of the ranking metric where it is a new one."""
        if self.best is None:
            return None
        values = published(trainer, self.best)
        is_new = bool(values) and len(values) != self._scored  # fewer: the run has started over
        self._scored = len(values)
        return values[-1] if is_new else None

    def state_dict(self) -> dict[str, Any]:
        """Return how many values of which ranking metric have been seen."""
        return {"scored": self._scored, "best": self.best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned; another metric's count tells nothing."""
        same = state_dict.get("best") == self.best
        self._scored = state_dict["scored"] if same else None
