"""The base class of sinks, the destinations of a run's records."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import attrs

from diptych.engine.distributed.collectives import rank
from diptych.engine.events import MetricsEvents, Outcome, RunEvents
from diptych.engine.handler import Handler

if TYPE_CHECKING:
    from diptych.engine.metrics.metrics_collector import Record
    from diptych.engine.trainer import Trainer


@attrs.define(eq=False)
class Sink(Handler):
    """A destination of published scalars, such as a file or a tracking service; on rank 0 only.

    A subclass writes in `_write`, which opens the destination if it is closed, and closes it in
    `_close`. `_close` is called when a run has completed, was terminated or failed, and after each
    record that arrives later. An interrupted run may continue, so its sinks stay open: a record
    must be complete when `_write` returns.
    """

    _run_is_over: bool = attrs.field(default=False, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Write each record of the trainer."""
        if rank() == 0:
            self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        trainer.add_event_handler(RunEvents.RESTORE, self._begin)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._log)
        trainer.add_event_handler(RunEvents.ENDED, self._end)

    def _begin(self, _: Trainer) -> None:
        self._run_is_over = False

    def _log(self, trainer: Trainer) -> None:
        record = trainer.metrics.record
        if record.values:
            self._write(trainer, record)
            if self._run_is_over:
                self._close(trainer)

    def _end(self, trainer: Trainer) -> None:
        if trainer.outcome is not Outcome.INTERRUPTED:
            self._close(trainer)
            self._run_is_over = True

    @abstractmethod
    def _write(self, trainer: Trainer, record: Record) -> None:
        """Write a record, which has at least one value."""

    @abstractmethod
    def _close(self, trainer: Trainer) -> None:
        """Close the destination if it is open."""
