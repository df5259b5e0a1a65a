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
import torch
from ignite.engine import Events

from diptych.engine.distributed import rank, sum_over_ranks
from diptych.engine.errors import CheckpointError, ResumeError
from diptych.engine.events import RunEvents
from diptych.engine.run_state import load_run_state, run_state
from diptych.handlers.background_writer import BackgroundWriter, snapshot
from diptych.handlers.checkpoint_store import SUFFIX, CheckpointStore, Entry
from diptych.handlers.export import check_can_export, export_weights
from diptych.handlers.run_lock import RunLock
from diptych.handlers.stop_signals import StopSignals, exit_error

if TYPE_CHECKING:
    from diptych.engine import Trainer

logger = logging.getLogger(__name__)


def _check_every(_: Any, __: attrs.Attribute[Any], value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    long = isinstance(value, timedelta) and value > timedelta()
    if value != "epoch" and not whole and not long:
        raise ValueError(
            f"every must be 'epoch', a number of iterations >= 1 or a timedelta, got {value!r}"
        )


@attrs.define(eq=False)
class CheckpointManager:
    """Saves the whole run on a cadence, keeps the latest and the best, and resumes.

    A checkpoint holds all that the rest of the run depends on: model, loss, optimizer, scaler,
    position, metrics so far, every attached handler that has a state, the place in the data, and
    the random generators. It loads with `weights_only=True`.

    On SIGTERM, SIGINT and SIGUSR1 the run finishes its iteration, saves, says so and ends with the
    conventional exit code; a second signal ends it at once. A save that fails is logged as an
    error and tried again at the next one; the checkpoints before it stand. Where the last save of
    a run failed, the run ends with the error.

    Event: `RunEvents.SAFE_POINT` (saves), `RunEvents.RESTORE` (resumes).
    Cost: one comparison an iteration between two saves. A save copies the state, writes it to the
        disk and reads it once; with `background` the run waits for the copy only, which stays in
        host memory for the next one.

    Args:
        directory: of this run's checkpoints; one process (and its ranks) at a time has it.
        every: "epoch", iterations, or a `datetime.timedelta` between two saves. Inside an epoch a
            run can be resumed with a loader that has `state_dict()` and `load_state_dict()`
            (`SeededLoader`, torchdata's); with any other, saves wait for the end of the epoch.
        best: the metric by which checkpoints are ranked; each new value is saved with the run.
        mode: whether a larger ("max") or a smaller ("min") value is better.
        keep: checkpoints to keep: with `best`, the best ones and the latest besides; without, the
            latest.
        resume: "auto" continues from the latest checkpoint in the directory, where there is one;
            a path continues from that file; None starts anew in an empty directory.
        background: whether a thread writes while the run goes on.
        export: whether each new best checkpoint (each checkpoint, without `best`) also gives
            `model.safetensors`, the weights alone. Needs the extra `safetensors`.

    Raises:
        ValueError: if an argument is out of range.
        ImportError: if `export` is asked for without the extra.
        CheckpointError: while running: see `save_checkpoint` and `load_checkpoint`.
    """

    directory: Path = attrs.field(converter=Path)
    every: int | timedelta | Literal["epoch"] = attrs.field(
        default="epoch", validator=_check_every, kw_only=True
    )
    best: str | None = attrs.field(default=None, kw_only=True)
    mode: Literal["max", "min"] = attrs.field(
        default="max", validator=attrs.validators.in_(("max", "min")), kw_only=True
    )
    keep: int = attrs.field(default=3, validator=attrs.validators.ge(1), kw_only=True)
    resume: Path | str | None = attrs.field(default="auto", kw_only=True)
    background: bool = attrs.field(default=False, kw_only=True)
    export: bool = attrs.field(default=False, kw_only=True)
    _trainer: Trainer | None = attrs.field(default=None, init=False, repr=False)
    _store: CheckpointStore = attrs.field(init=False, repr=False)
    _writer: BackgroundWriter = attrs.field(init=False, repr=False)
    _lock: RunLock = attrs.field(init=False, repr=False)
    _signals: StopSignals = attrs.field(factory=StopSignals, init=False, repr=False)
    _snapshot: Any = attrs.field(default=None, init=False, repr=False)
    _scored: int = attrs.field(default=0, init=False, repr=False)
    _due: bool = attrs.field(default=False, init=False, repr=False)
    _saved_at: float = attrs.field(default=0.0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.export:
            check_can_export()
        self._store = CheckpointStore(self.directory)
        self._writer = BackgroundWriter(in_thread=self.background)
        self._lock = RunLock(self.directory)

    def attach(self, trainer: Trainer) -> None:
        """Save on the trainer's safe points, and resume before its run is decided."""
        self._trainer = trainer
        trainer.add_event_handler(RunEvents.RESTORE, self._restore)
        trainer.add_event_handler(Events.STARTED, self._say_what_can_be_resumed)
        if self.every == "epoch":
            trainer.add_event_handler(Events.EPOCH_COMPLETED, self._fall_due)
        elif isinstance(self.every, int):
            trainer.every(self.every, self._fall_due)
        trainer.add_event_handler(RunEvents.SAFE_POINT, self._at_safe_point)
        trainer.add_event_handler(Events.COMPLETED, self._finish)
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
        path = self._submit(epoch, metrics, by_hand=True)
        self._writer.wait()
        failure = self._writer.failure()
        if failure is not None:
            raise failure
        return path

    def _submit(self, epoch: int, metrics: Mapping[str, float], *, by_hand: bool) -> Path:
        """Give a save to the writer; return the file that it makes."""
        trainer = self._attached()
        state = {**run_state(trainer), "saved": {"epoch": epoch, "metrics": dict(metrics)}}
        inside = f"_iteration_{trainer.state.iteration}" if trainer.epoch_iteration else ""
        entry = Entry(
            file=f"checkpoint_epoch_{epoch}{inside}{SUFFIX}",
            epoch=epoch,
            iteration=trainer.state.iteration,
            metrics=dict(metrics),
            score=metrics.get(self.best) if self.best else None,
            resumable=not _place_is_lost(trainer),
            by_hand=by_hand,
        )
        if rank() == 0:
            self._writer.wait()
            self._tell_failure()
            if self.background:
                state = self._snapshot = snapshot(state, self._snapshot)
            self._writer.submit(partial(self._write, entry, state))
        return self.directory / entry.file

    def _write(self, entry: Entry, state: Mapping[str, Any]) -> None:
        self._store.write(entry, state)
        best = self._ranked(self._store.entries())
        if self.export and (not self.best or (best and best[0].file == entry.file)):
            export_weights(state["model"], self.directory / "model.safetensors")
        self._store.remove(self._superfluous())

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
        state = store.read(path.name)
        try:
            load_run_state(self._attached(), state)
        except (CheckpointError, ResumeError) as error:
            raise type(error)(f"checkpoint {path}: {error}") from error
        return state["saved"]["epoch"], dict(state["saved"]["metrics"])

    def get_latest_checkpoint(self) -> Path | None:
        """Return the complete checkpoint that a run would resume from, or None."""
        entries = self._resumable()
        return self.directory / entries[0].file if entries else None

    def get_best_checkpoint(self) -> Path | None:
        """Return the complete checkpoint with the best score, or None."""
        ranked = self._ranked(self._store.entries())
        return self.directory / ranked[0].file if ranked else None

    def _attached(self) -> Trainer:
        if self._trainer is None:
            raise CheckpointError("a CheckpointManager must be attached to a trainer first")
        return self._trainer

    def _resumable(self) -> list[Entry]:
        """Return the entries that a run can go on from, the latest first."""
        entries = [entry for entry in self._store.entries() if entry.resumable]
        return sorted(entries, key=lambda entry: -entry.iteration)

    def _ranked(self, entries: list[Entry]) -> list[Entry]:
        """Return the entries that have a score, the best first, the earlier first where equal."""
        sign = -1 if self.mode == "max" else 1
        scored = [(entry.score, entry) for entry in entries if entry.score is not None]
        return [
            entry
            for _, entry in sorted(scored, key=lambda pair: (sign * pair[0], pair[1].iteration))
        ]

    def _restore(self, trainer: Trainer) -> None:
        self._signals.install()
        self._saved_at = time.monotonic()
        if rank() == 0:
            self._lock.acquire()
            self._store.sweep()
        if trainer.state.iteration:  # a run that goes on in this process
            return
        if self.resume is None:
            self._refuse_to_mix()
        elif self.resume != "auto":
            self.load_checkpoint(self.resume)
        else:
            self._resume_latest()

    def _release(self, _: Trainer) -> None:
        self._writer.wait()
        self._signals.remove()
        self._lock.release()

    def _refuse_to_mix(self) -> None:
        latest = self.get_latest_checkpoint()
        if latest is not None:
            raise CheckpointError(
                f"the directory of a new run must hold no checkpoint, got {latest}: take another "
                "directory, or resume='auto' to continue that run"
            )

    def _resume_latest(self) -> None:
        """Continue from the latest checkpoint that can be read; name each that cannot."""
        entries = self._resumable()
        for entry in entries:
            try:
                state = self._store.read(entry.file)
            except CheckpointError as error:
                logger.warning("%s; the one before it is taken", error)
                continue
            load_run_state(self._attached(), state)
            logger.info("resumed %s", self.directory / entry.file)
            return
        if entries:
            raise CheckpointError(
                f"none of {len(entries)} checkpoints in {self.directory} can be read"
            )

    def _say_what_can_be_resumed(self, trainer: Trainer) -> None:
        if self.every != "epoch" and trainer.batches.position() is None:
            logger.warning(
                "%s cannot go to a position, so the run is saved at the end of each epoch only",
                type(trainer.state.dataloader).__name__,
            )

    def _fall_due(self, _: Trainer) -> None:
        self._due = True

    def _at_safe_point(self, trainer: Trainer) -> None:
        self._tell_failure()
        if isinstance(self.every, timedelta):
            self._due |= self._time_is_up(self.every)
        number = self._signals.received()
        score = self._new_score(trainer)
        due = (self._due or number > 0) and not _place_is_lost(trainer)
        if due or score is not None:
            self._due = self._due and not due
            self._save(trainer, score)
        if number:
            self._writer.wait()
            latest = self.get_latest_checkpoint()
            logger.warning("signal %d: the run ends here; it resumes from %s", number, latest)
            raise exit_error(number)

    def _time_is_up(self, every: timedelta) -> bool:
        up = torch.tensor(time.monotonic() - self._saved_at >= every.total_seconds())
        return bool(sum_over_ranks(up.long()) > 0)

    def _save(self, trainer: Trainer, score: float | None) -> None:
        self._saved_at = time.monotonic()
        metrics = {
            k: float(v) for k, v in trainer.state.metrics.items() if isinstance(v, (int, float))
        }
        if score is None and self.best is not None:
            metrics.pop(self.best, None)  # an older value, of other weights
        self._submit(trainer.state.epoch, metrics, by_hand=False)
        self._check_best_is_published(trainer)

    def _tell_failure(self) -> None:
        failure = self._writer.failure()
        if failure is not None:
            logger.error("%s; the run goes on, and the checkpoints before it stand", failure)

    def _finish(self, _: Trainer) -> None:
        self._writer.wait()
        failure = self._writer.failure()
        if failure is not None:
            raise failure

    def _new_score(self, trainer: Trainer) -> float | None:
        """Return the value of the ranking metric where it is a new one."""
        if self.best is None:
            return None
        try:
            history = trainer.metrics.get_history(self.best)
        except KeyError:
            return None
        is_new = len(history) != self._scored  # fewer: the run has started over
        self._scored = len(history)
        return history[-1] if is_new else None

    def _check_best_is_published(self, trainer: Trainer) -> None:
        if self.best is not None and self._scored == 0 and not trainer.epoch_iteration:
            there = ", ".join(sorted(trainer.state.metrics)) or "none"
            raise CheckpointError(
                f"best must be a metric that the run publishes by the end of its first epoch, got "
                f"{self.best!r}; there are {there}"
            )

    def _superfluous(self) -> set[str]:
        entries = [entry for entry in self._store.entries() if not entry.by_hand]
        by_time = [entry for entry in self._resumable() if not entry.by_hand]
        kept = self._ranked(entries)[: self.keep] if self.best else by_time[: self.keep]
        return {e.file for e in entries} - {e.file for e in (*kept, *by_time[:1])}

    def state_dict(self) -> dict[str, int]:
        """Return how many values of the ranking metric have been seen."""
        return {"scored": self._scored}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on from a state that `state_dict` returned."""
        self._scored = state_dict["scored"]


def _place_is_lost(trainer: Trainer) -> bool:
    """Say whether the run stands inside an epoch of a loader that cannot go there again."""
    return bool(trainer.epoch_iteration) and trainer.batches.position() is None
