"""Saves a run in one directory: when a checkpoint is due, what it is called, and the next steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import attrs
import torch.distributed as dist
from ignite.engine import Events

from diptych.engine.checks import numbers_in
from diptych.engine.distributed.agreement import LaggedMaximum, on_rank_zero
from diptych.engine.distributed.collectives import exchange_timeout, rank, world_size
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.distributed.hang_report import entered_places
from diptych.engine.errors import CheckpointError
from diptych.engine.events import Outcome, RunEvents
from diptych.engine.loop.listener import Listener
from diptych.engine.optimizers.optimizer_modes import evaluation_weights, has_modes, trained_weights
from diptych.engine.state.module_state import clean_state_dict
from diptych.engine.state.run_state import run_state
from diptych.engine.trainer import Trainer
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.checkpoint_writer import CheckpointWriter
from diptych.handlers.checkpointing.entries import SUFFIX, Entry, Ranking, resumable_entries
from diptych.handlers.checkpointing.export import EVALUATED
from diptych.handlers.checkpointing.resume import position_is_lost
from diptych.handlers.checkpointing.run_lock import RunLock
from diptych.handlers.checkpointing.save_policy import (
    RunStatus,
    SavedAt,
    SaveDecision,
    SaveState,
    decide_at_end,
    decide_at_restore,
    decide_at_safe_point,
)
from diptych.handlers.evaluation.watched_metric import missing_metric, published_values

logger = logging.getLogger(__name__)

SAFE = (
    Events.STARTED,
    RunEvents.SAFE_POINT,
    Events.TERMINATE,
    Events.INTERRUPT,
    Events.COMPLETED,
    RunEvents.ENDED,
)
"""The events in which nothing of an update or of an epoch's end is pending."""
BEFORE_ITERATION = (Events.EPOCH_STARTED, Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED)
"""The events before an iteration that `state.iteration` does not count yet."""


class Request(NamedTuple):
    """A save that was asked for inside an event, to be carried out at the next safe point."""

    epoch: int
    metrics: dict[str, float]
    name: str


@attrs.define(eq=False)
class DirectorySaver:
    """Saves a run in one directory: by cadence, by score, on request, and at the end.

    Attributes:
        store: the directory.
        ranking: the order of its checkpoints.
        every: the cadence; see `CheckpointManager`.
        writer: writes the checkpoints.
        lock: keeps other processes away.
        state: what the save policy remembers.
        is_open: whether a run is in progress.
    """

    store: CheckpointStore
    ranking: Ranking
    every: int | timedelta | Literal["epoch"]
    writer: CheckpointWriter
    lock: RunLock = attrs.field(init=False)
    state: SaveState = attrs.field(default=SaveState(), init=False)
    is_open: bool = attrs.field(default=False, init=False)
    _ranks: LaggedMaximum = attrs.field(factory=LaggedMaximum, init=False)
    _group: Any = attrs.field(default=None, init=False)
    _deadline: float = attrs.field(default=math.inf, init=False)
    _asleep: bool = attrs.field(default=False, init=False)
    _requests: list[Request] = attrs.field(factory=list, init=False)
    _score: float | None = attrs.field(default=None, init=False)  # of the last save
    _record: object = attrs.field(default=None, init=False)  # the last one before it
    _ahead: list[CheckpointStore] = attrs.field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        self.lock = RunLock(self.directory)

    @property
    def directory(self) -> Path:
        """The path of the directory."""
        return self.store.directory

    def latest(self) -> Path | None:
        """Return the complete checkpoint from which a run would resume, or None."""
        entries = resumable_entries(self.store.entries())
        return self.directory / entries[0].file if entries else None

    def best(self) -> Path | None:
        """Return the complete checkpoint with the best score, or None."""
        ranked = self.ranking.ranked(self.store.entries()) if self.ranking.metric else []
        return self.directory / ranked[0].file if ranked else None

    # -- a run -----------------------------------------------------------------------------------

    def open(self, trainer: Trainer) -> None:
        """Prepare for a run: lock the directory and remove what a killed process left."""
        self.is_open = True
        self._requests, self._ahead, self._asleep = [], [], False
        self._ranks.open()
        self._set_deadline()
        on_rank_zero(partial(self._acquire, trainer))

    def _acquire(self, trainer: Trainer) -> None:
        self.lock.acquire(trainer)
        self.store.sweep()
        self.writer.export_if_outdated()

    def close(self, trainer: Trainer) -> None:
        """Write what is still to be written, and unlock the directory."""
        try:
            self._save_rest(trainer)
        finally:
            self.is_open = False
            self._ranks.close()
            self.lock.release()

    def _save_rest(self, trainer: Trainer) -> None:
        if self._requests and trainer.outcome is Outcome.FAILED and world_size() > 1:
            logger.error("The run failed before %s was saved.", self._requests[0].name)
        elif self.is_open:
            self._save_requests(trainer)
        self.writer.wait()
        if trainer.outcome in {Outcome.COMPLETED, Outcome.TERMINATED}:
            self._save_completed(trainer)

    def _save_completed(self, trainer: Trainer) -> None:
        """Keep that the handlers of `COMPLETED` have ended, and what they have published."""
        has_more = on_rank_zero(lambda: trainer.metrics.record is not self._record)
        try:
            if self.state.saved == position_of(trainer) and has_more:
                self._save(trainer, self._score)
                on_rank_zero(self.writer.finish)
        except CheckpointError as error:
            if rank() == 0:
                logger.warning("%s; the checkpoint before COMPLETED is intact", error)
        if rank() == 0:
            self._mark_completed(trainer.state.iteration)

    @contextmanager
    def locked(self, trainer: Trainer) -> Iterator[None]:
        """Lock the directory for the length of the context; a run in progress has locked it."""
        if self.is_open:
            yield
            return
        on_rank_zero(partial(self.lock.acquire, trainer))
        try:
            yield
        finally:
            self.lock.release()

    def _mark_completed(self, iteration: int) -> None:
        """Note the end of `COMPLETED` in the manifest, unless the checkpoint says so already."""

        def revised(entry: Entry) -> Entry:
            ended = entry.completed is False and entry.iteration == iteration
            return attrs.evolve(entry, completed=True) if ended else entry

        try:
            self.store.revise(revised)
        except CheckpointError as error:
            logger.warning("%s. The next run fires COMPLETED again.", error)

    def continue_from(self, trainer: Trainer, folder: Path, ahead: list[CheckpointStore]) -> None:
        """Continue after a checkpoint was loaded.

        No run is to continue from the directories `ahead`, which have later checkpoints, once this
        one has saved.
        """
        self._ahead = ahead
        self._record = trainer.metrics.record
        saved = position_of(trainer) if folder == self.directory else None
        self.state = self.state._replace(saved=saved)
        if trainer.left_event is None:
            status = self._run_status(trainer)
            self._carry_out(trainer, decide_at_restore(self.state, status))

    def start_over(self) -> None:
        """Forget the last save and the judged values: the run is another one."""
        self.state = self.state._replace(saved=None, values=0)

    def count_values(self, trainer: Trainer) -> None:
        """Treat the values so far as judged if a checkpoint does not know how many were."""
        if self.state.values is None:
            self.state = self.state._replace(values=len(self.scores(trainer)))

    # -- the decision to save --------------------------------------------------------------------

    def make_due(self) -> None:
        """Save at the next safe point."""
        self.state = self.state._replace(due=True)
        self._asleep = False

    def at_safe_point(self, trainer: Trainer, signal: int) -> int:
        """Save if it is time to; return the signal on which all ranks are to end, or 0."""
        if self._asleep and not signal:
            return 0
        self.writer.log_failure()
        signal, timeouts = self.exchange(signal)
        status = self._run_status(trainer, signal, timeouts)
        decision = decide_at_safe_point(self.state, status)
        self._carry_out(trainer, decision, requests=not status.is_finished)
        # Until something wakes it, only a signal can cause a save: skip the decision.
        self._asleep = (
            self.ranking.metric is None
            and not isinstance(self.every, timedelta)
            and not self.state.due
            and not self._requests
            and self.writer.idle
            and world_size() == 1
        )
        return decision.signal

    def exchange(self, signal: int) -> tuple[int, ...]:
        """Return the signal and the number of timeouts, over all ranks."""
        timeouts = self.state.timeouts + (time.monotonic() >= self._deadline)
        return self._ranks.exchange(signal, timeouts)

    def save_end(self, trainer: Trainer, signal: int) -> int:
        """Save the end of a run; return the signal on which all ranks are to end, or 0."""
        status = self._run_status(trainer, save_failed=on_rank_zero(self._last_save_failed))
        self._carry_out(trainer, decide_at_end(self.state, status))
        on_rank_zero(self.writer.finish)
        # The exchange lags by one call: the second call returns the maximum of the first.
        self._ranks.exchange(signal, 0)
        return self._ranks.exchange(signal, 0)[0]

    def save_left(self, trainer: Trainer) -> None:
        """Save a run whose event an exception has left, unless the last save holds that."""
        at = position_of(trainer)
        if trainer.left_event is None or self.state.saved == at:
            return
        self.state = self.state._replace(saved=at)
        self._save(trainer, None)
        on_rank_zero(self.writer.finish)

    def _run_status(
        self, trainer: Trainer, signal: int = 0, timeouts: int = 0, *, save_failed: bool = False
    ) -> RunStatus:
        values, missing, metric = self.scores(trainer), None, self.ranking.metric
        if metric is not None and not values:
            missing = missing_metric(trainer, "best", metric)
        at = position_of(trainer)
        lost = position_is_lost(trainer)
        finished = trainer.is_finished
        return RunStatus(at, finished, lost, signal, timeouts, values, missing, save_failed)

    def scores(self, trainer: Trainer) -> list[float]:
        """Return the values of the ranking metric so far."""
        metric = self.ranking.metric
        return [] if metric is None else published_values(trainer, metric)

    def _last_save_failed(self) -> bool:
        self.writer.wait()
        return self.writer.log_failure()

    def _carry_out(
        self, trainer: Trainer, decision: SaveDecision, *, requests: bool = True
    ) -> None:
        self.state = decision.state
        if decision.save:
            self._save(trainer, decision.score)
        if requests:
            self._save_requests(trainer)
        if decision.missing is not None:
            on_rank_zero(self.writer.finish)
            raise CheckpointError(decision.missing)

    # -- saving ----------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, score: float | None) -> None:
        self._set_deadline()
        self._score, self._record = score, trainer.metrics.record
        metrics = numbers_in(trainer.state.metrics)
        if self.ranking.metric is not None:
            metrics.pop(self.ranking.metric, None)  # it may be an older value, of other weights
            metrics.update({} if score is None else {self.ranking.metric: score})
        self._retire_later_checkpoints(trainer.state.iteration)
        name = _name_here(trainer, trainer.state.epoch)
        asked = [request for request in self._requests if request.name == name]
        for request in asked:  # one file for both
            metrics.update(request.metrics)
            self._requests.remove(request)
        self.submit(trainer, trainer.state.epoch, metrics, by_hand=bool(asked))

    def _save_requests(self, trainer: Trainer) -> None:
        requests, self._requests = self._requests, []
        for request in requests:
            self.submit(trainer, request.epoch, request.metrics, by_hand=True, name=request.name)

    def request(self, trainer: Trainer, epoch: int, metrics: Mapping[str, float]) -> Path:
        """Save at the next safe point; return the file that will be written."""
        ends = trainer.epoch_iteration and not trainer.inside_epoch
        coming = any(listener.event in BEFORE_ITERATION for listener in _running(trainer))
        name = _file_name(epoch, None if ends else trainer.state.iteration + coming)
        self._requests.append(Request(epoch, dict(metrics), name))
        self._asleep = False
        return self.directory / on_rank_zero(partial(self.store.next_name, name))

    def submit(
        self,
        trainer: Trainer,
        epoch: int,
        metrics: Mapping[str, float],
        *,
        by_hand: bool,
        name: str | None = None,
    ) -> None:
        """Pass the state of the run to the writer."""
        on_rank_zero(self.lock.follow)
        metric = self.ranking.metric
        score = None if metric is None else metrics.get(metric)
        entry = Entry(
            file=name or _name_here(trainer, epoch),
            epoch=epoch,
            iteration=trainer.state.iteration,
            metrics=dict(metrics),
            score=score,
            scored_by=None if score is None else metric,
            resumable=not position_is_lost(trainer),
            by_hand=by_hand,
            completed=trainer.completed if trainer.is_finished else None,
        )
        self._asleep = False
        group = self.shard_group(trainer)
        with trained_weights(*trainer.optimizers):
            state = {**run_state(trainer), "saved": {"epoch": epoch, "metrics": dict(metrics)}}
            if self.writer.exports:
                state |= _evaluated_weights(trainer)
            if rank() == 0 or group is not None:
                self.writer.submit(entry, state, group)
        trainer.fire_event(RunEvents.SAVED)

    def shard_group(self, trainer: Trainer) -> Any:
        """Return the process group for saving a sharded model, made at the first use; or None."""
        if has_shards(trainer.model) and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=exchange_timeout())
        return self._group

    def _retire_later_checkpoints(self, iteration: int) -> None:
        """After a run has gone back: let no run continue from the others' later checkpoints."""

        def revised(entry: Entry) -> Entry:
            resumable = entry.resumable and entry.iteration <= iteration
            return attrs.evolve(entry, resumable=resumable)

        for store in self._ahead:
            if store is not self.store:  # its own ones are retired when this one is listed
                on_rank_zero(partial(store.revise, revised))
        self._ahead.clear()

    def _set_deadline(self) -> None:
        if isinstance(self.every, timedelta):
            self._deadline = time.monotonic() + self.every.total_seconds()


def _evaluated_weights(trainer: Trainer) -> dict[str, Any]:
    """Return a copy of the weights that optimizers with `train()` and `eval()` evaluate.

    Returns:
        The part of a checkpoint, by its name; empty for any other optimizer.
    """
    if not any(map(has_modes, trainer.optimizers)):
        return {}
    with evaluation_weights(*trainer.optimizers):
        weights = clean_state_dict(trainer.model)
        return {EVALUATED: {key: value.detach().clone() for key, value in weights.items()}}


def is_safe(trainer: Trainer) -> bool:
    """Return whether nothing is pending: in a handler of an event in `SAFE`, and of no other."""
    running = _running(trainer)
    return bool(running) and all(listener.event in SAFE for listener in running)


def position_of(trainer: Trainer) -> SavedAt:
    """Return the position of a run."""
    return trainer.state.iteration, trainer.epoch_iteration


def _name_here(trainer: Trainer, epoch: int) -> str:
    return _file_name(epoch, trainer.state.iteration if trainer.epoch_iteration else None)


def _file_name(epoch: int, iteration: int | None) -> str:
    """Return the name of a checkpoint; `iteration` is None between two epochs."""
    inside = "" if iteration is None else f"_iteration_{iteration}"
    return f"checkpoint_epoch_{epoch}{inside}{SUFFIX}"


def _running(trainer: Trainer) -> list[Listener]:
    """Return the trainer's listeners that are being called in this thread."""
    own = {id(listener) for listener in trainer.listeners}
    places = [place for place, _ in entered_places()]
    return [place for place in places if isinstance(place, Listener) and id(place) in own]
