"""The savers of one trainer's run together: they start from one checkpoint and end as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs

from diptych.engine.distributed.agreement import on_rank_zero
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.errors import CheckpointError, ResumeError
from diptych.engine.evaluator import EvaluatesModel
from diptych.engine.state.resume_changes import WhenChanged
from diptych.engine.state.run_identity import closures_of
from diptych.engine.state.run_state import load_run_state
from diptych.engine.trainer import Trainer
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.directory_saver import DirectorySaver
from diptych.handlers.checkpointing.entries import Entry, resumable_entries
from diptych.handlers.checkpointing.ranking_changes import ranking_changes, saved_rankings
from diptych.handlers.checkpointing.resume import Source, StartPoint, find_start, read_start
from diptych.handlers.checkpointing.stop_signals import StopSignals

logger = logging.getLogger(__name__)

MISFITS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError)
"""The errors of a load whose checkpoint has another structure than the run expects."""


@attrs.define(eq=False)
class RunSavers:
    """All savers of one run, the signals that end it, and the checkpoint that it starts from.

    Attributes:
        trainer: the trainer.
        savers: one for each directory, in the order in which they were attached.
        changes: what happens if the script differs from the saved run.
        kind: the name of the handlers' class, under which they find their states.
        signals: the signals that end the run.
    """

    trainer: Trainer
    savers: Sequence[DirectorySaver]
    changes: WhenChanged
    kind: str
    signals: StopSignals = attrs.field(factory=StopSignals, init=False)
    _leaving: tuple[int, BaseException] | None = attrs.field(default=None, init=False)

    # -- the start of a run ----------------------------------------------------------------------

    def open(self) -> None:
        """Install the signals and lock all directories."""
        self._leaving = None
        self.signals.install()
        for saver in self.savers:
            saver.writer.follow([other.writer for other in self.savers])
            saver.open(self.trainer)

    def resume(self, wanted: Sequence[Path | str | None]) -> None:
        """Load the checkpoint from which the run starts, if there is one.

        `wanted` is the argument `resume` of each directory.

        Raises:
            CheckpointError, ResumeError: as `find_start` and `load_run_state`.
        """
        for saver in self.savers:
            saver.start_over()
        listed = on_rank_zero(lambda: [saver.store.entries() for saver in self.savers])
        sources = [
            Source(saver.store, resume, entries)
            for saver, resume, entries in zip(self.savers, wanted, listed, strict=True)
        ]
        start = find_start(sources, self.savers[0].shard_group(self.trainer))
        if start is None:
            self._report_assigned()
            return
        self.load(start)
        if rank() == 0:
            self._log_rankings(start, sources)
        self._continue_from(start, listed)

    def _report_assigned(self) -> None:
        """Log what functions assign in their closures, when a new run starts."""
        names = closures_of(self.trainer, assigned=True)
        if names and rank() == 0 and not self.trainer.state.iteration:
            logger.warning(
                "Checkpoints lack the variables that functions at events assign: %s. A resumed run "
                "starts them anew.\nIf the result depends on them, keep them in trainer.state, "
                "which is saved, or in a class with state_dict() and load_state_dict().",
                ", ".join(names),
            )

    def _continue_from(self, start: StartPoint, listed: Sequence[list[Entry]]) -> None:
        newest = [resumable_entries(entries)[:1] for entries in listed]
        ahead = [
            saver.store
            for saver, entries in zip(self.savers, newest, strict=True)
            if any(entry.iteration > self.trainer.state.iteration for entry in entries)
        ]
        for saver, entries in zip(self.savers, newest, strict=True):
            if all(entry.iteration <= self.trainer.state.iteration for entry in entries):
                on_rank_zero(saver.writer.remove_superfluous)
            saver.continue_from(self.trainer, start.path.parent, ahead)

    def read(self, path: Path) -> StartPoint:
        """Read a checkpoint on all ranks."""
        return read_start(path, self.savers[0].shard_group(self.trainer))

    def load(self, start: StartPoint) -> None:
        """Load a checkpoint into the trainer.

        Raises:
            CheckpointError, ResumeError: as `load_run_state`, naming the file.
        """
        before = [saver.state for saver in self.savers]
        for saver in self.savers:  # one whose state is not in the checkpoint knows of no value
            saver.state = saver.state._replace(values=None)
        try:
            load_run_state(self.trainer, start.state, self.changes)
        except (CheckpointError, ResumeError) as error:
            for saver, state in zip(self.savers, before, strict=True):
                saver.state = state
            raise type(error)(f"checkpoint {start.path}: {error}") from error
        except MISFITS as error:
            if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
                raise
            raise CheckpointError(
                f"checkpoint {start.path} cannot be loaded: {error!r}. A part of it has another "
                "type than this run expects, or load_state_dict() of a handler has failed."
            ) from error
        if start.completed is not None:
            self.trainer.completed = start.completed
        for saver in self.savers:
            saver.count_values(self.trainer)
        self._log_start(start)

    def _log_start(self, start: StartPoint) -> None:
        # A warning, so that by default a run that was expected to start anew says where it starts.
        position, level = self.trainer.state, logging.DEBUG if rank() else logging.WARNING
        logger.log(
            level,
            "Resumed from %s (epoch %d, iteration %d).",
            start.path,
            position.epoch,
            position.iteration,
        )

    def _log_rankings(self, start: StartPoint, sources: Sequence[Source]) -> None:
        folder = start.path.parent
        there = next((s.entries for s in sources if s.store.directory == folder), None)
        if there is None:
            there = CheckpointStore(folder).entries()
        saved = saved_rankings(start.state["handlers"], self.kind)
        now = {saver.ranking.metric for saver in self.savers}
        for saver, source in zip(self.savers, sources, strict=True):
            for line in ranking_changes(
                saver.ranking,
                source,
                saved=saved,
                others=now,
                start=(folder, there),
                values=len(saver.scores(self.trainer)),
            ):
                logger.warning("%s.", line)

    # -- during a run ----------------------------------------------------------------------------

    def at_safe_point(self, saver: DirectorySaver) -> None:
        """Save if it is time to; on a signal, end the run once all directories are saved."""
        if signal := saver.at_safe_point(self.trainer, self.signals.number):
            self._leave(saver, signal)

    def save_end(self, saver: DirectorySaver) -> None:
        """Save the end of the run in one directory; on a signal, end it once all are saved."""
        self._leave(saver, saver.save_end(self.trainer, self.signals.number))

    def _leave(self, saver: DirectorySaver, signal: int) -> None:
        """End this process once the last saves are on the disk; all ranks wait for them."""
        if not signal or saver is not self.savers[-1]:
            return
        for other in self.savers:
            on_rank_zero(other.writer.finish)
        self._log_end(signal)
        raise self.signals.answer(signal)

    def in_evaluation(self) -> None:
        """Leave an evaluation on a signal."""
        if self.savers[-1].is_open:
            signal, _ = self.savers[-1].exchange(self.signals.number)
            if signal:
                self._leaving = signal, self.signals.answer(signal)
                raise self._leaving[1]

    def at_exception(self, error: BaseException) -> None:
        """Save a run that has left an evaluation on a signal, or failed there or at an epoch's end.

        An exception elsewhere inside an epoch may say that the weights are not worth saving.
        """
        if self._leaving is not None and error is self._leaving[1]:
            for saver in self.savers:
                saver.save_left(self.trainer)
            self._log_end(self._leaving[0])
        elif isinstance(error, Exception) and world_size() == 1 and self._is_worth_saving:
            try:
                for saver in self.savers:
                    saver.save_left(self.trainer)
            except Exception:  # whatever it is must not replace the run's own error
                logger.exception("The run could not be saved where it failed.")

    @property
    def _is_worth_saving(self) -> bool:
        left = self.trainer.left_event
        if left is None:
            return False
        evaluated = any(isinstance(one, EvaluatesModel) for one in self.trainer.failed_owners)
        return evaluated or not left.in_iteration

    def _log_end(self, signal: int) -> None:
        newest = on_rank_zero(self._newest)
        goes_on = f"It resumes from {newest}" if newest is not None else "It will start over"
        if rank() == 0:
            logger.warning("Signal %d ends the run here. %s.", signal, goes_on)

    def _newest(self) -> Path | None:
        """Return the newest checkpoint of all directories; of equal ones, the last directory's."""
        found = [
            (entry.iteration, place, saver.directory / entry.file)
            for place, saver in enumerate(self.savers)
            for entry in resumable_entries(saver.store.entries())[:1]
        ]
        return max(found)[-1] if found else None

    def close(self) -> None:
        """Unlock the directories; a signal that was not answered acts now."""
        with ExitStack() as stack:  # whatever one of them raises
            stack.callback(self.signals.remove)
            for saver in reversed(self.savers):
                stack.callback(saver.close, self.trainer)
