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
    """The base class of sinks: writes every record of published scalars to a destination.

    A subclass implements `write_record`, which opens the destination if it is closed, and
    `close_destination`. A sink is closed when a run has completed, was terminated or failed, and
    after each record that arrives later. An interrupted run may continue, so its sinks stay open: a
    record must be complete when `write_record` returns. To use more events, extend `listen`.

    Event: `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Runs on rank 0 only.
    Cost: that of `write_record`, at log points only.
    """

    _run_is_over: bool = attrs.field(default=False, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Write each record of the trainer."""
        if rank() == 0:
            self.listen(trainer)

    def listen(self, trainer: Trainer) -> None:
        """Add the sink's functions to the trainer's events; called on rank 0 only."""
        trainer.add_event_handler(RunEvents.RESTORE, self._begin)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._log)
        trainer.add_event_handler(RunEvents.ENDED, self._end)

    def _begin(self, _: Trainer) -> None:
        self._run_is_over = False

    def _log(self, trainer: Trainer) -> None:
        record = trainer.metrics.record
        if record.values:
            self.write_record(trainer, record)
            if self._run_is_over:
                self.close_destination(trainer)

    def _end(self, trainer: Trainer) -> None:
        if trainer.outcome is not Outcome.INTERRUPTED:
            self.close_destination(trainer)
            self._run_is_over = True

    @abstractmethod
    def write_record(self, trainer: Trainer, record: Record) -> None:
        """Write a record.

        Args:
            trainer: the trainer that published it.
            record: its `step` is the iteration; its `values`, at least one, are floats by tag.
        """

    @abstractmethod
    def close_destination(self, trainer: Trainer) -> None:
        """Close the destination if it is open."""
