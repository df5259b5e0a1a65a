"""The base class of sinks, the destinations of a run's records."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import attrs

from diptych.engine.events import MetricsEvents, Outcome, RunEvents
from diptych.handlers.output.output_handler import OutputHandler

if TYPE_CHECKING:
    from diptych.engine.metrics.metrics_collector import Record
    from diptych.engine.trainer import Trainer

OwnSink = TypeVar("OwnSink", bound="Sink")
MOST_PENDING = 1000
"""Records that a sink keeps in memory until its destination can be written again."""
MOST_REFUSALS = 3
"""Errors, other than those of the system, after which a record may be at fault."""


@attrs.define(eq=False)
class Sink(OutputHandler):
    """The base class of sinks: writes every record of published scalars to a destination.

    A subclass implements `write_record`, which opens the destination if it is closed, and
    `close_destination`. A sink is closed when a run has completed, was terminated or failed, and
    after each record that arrives later. An interrupted run may continue, so its sinks stay open: a
    record must be complete when `write_record` returns. To use more events, extend `listen`.

    A sink never ends a run. If `write_record` raises, the error is logged once and the run
    continues. The sink keeps the record, up to 1000 of them, and passes it to `write_record` again
    at the next log point and at the end, in order, until it returns. After a slow failure, such as
    a time-out, the pause is 20 times as long as the attempt. A record that has failed three times,
    not with an `OSError`, is dropped if the one after it can be written. See `OutputHandler` for
    what reaches the caller, and for `unwritten`.

    Event: `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Runs on rank 0 only.
    Cost: that of `write_record`, at log points only.
    """

    _run_is_over: bool = attrs.field(default=True, init=False, repr=False)
    _pending: deque[Callable[[], object]] = attrs.field(init=False, repr=False)
    _refusals: int = attrs.field(init=False, repr=False)

    def __new__(cls: type[OwnSink], *_: object, **__: object) -> OwnSink:
        """Make the sink; a subclass need not call an `__init__` of this class."""
        self = super().__new__(cls)
        self._pending, self._refusals, self._run_is_over = deque(), 0, True
        return self

    def listen(self, trainer: Trainer) -> None:
        """Add the sink's functions to the trainer's events; called on rank 0 only."""
        trainer.add_event_handler(RunEvents.RESTORE, self._begin)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._log)
        trainer.add_event_handler(RunEvents.ENDED, self._end)

    @property
    def unwritten(self) -> dict[str, int]:
        """The number of records that are not written, by destination."""
        missing = super().unwritten
        if self._pending:
            missing[self.destination] = missing.get(self.destination, 0) + len(self._pending)
        return missing

    def _begin(self, _: Trainer) -> None:
        self._run_is_over = False

    def _log(self, trainer: Trainer) -> None:
        record = trainer.metrics.record
        if record.values:
            self.deliver(partial(self.write_record, trainer, record))
            if self._run_is_over:
                self._close(trainer)

    def _end(self, trainer: Trainer) -> None:
        self._write_pending()
        if trainer.outcome is not Outcome.INTERRUPTED:
            self._close(trainer)
            self._run_is_over = True

    def _close(self, trainer: Trainer) -> None:
        with self.tolerated():
            self.close_destination(trainer)

    def deliver(self, write: Callable[[], object]) -> None:
        """Call a function that writes to the destination, after everything that is pending.

        If it raises, it is called again later.
        """
        self._pending.append(write)
        if len(self._pending) > MOST_PENDING:
            # The first ones describe the run, and the last ones its end.
            self._drop(MOST_PENDING // 2)
        if self.may_retry(self.destination):
            self._write_pending()

    def _write_pending(self) -> None:
        while self._pending:
            if self._written(0):
                self._pending.popleft()
                self._refusals = 0
            elif self._refusals < MOST_REFUSALS or not self._written(1):
                return
            else:
                del self._pending[1]
                self._write_or_drop_first()

    def _written(self, index: int) -> bool:
        """Return whether a pending function returned; False if there is none."""
        if index >= len(self._pending):
            return False
        with self.tolerated():
            try:
                self._pending[index]()
            except OSError:
                raise
            except Exception:
                self._refusals += 1
                raise
            return True
        return False

    def _write_or_drop_first(self) -> None:
        """Write the first record, if the destination has just recovered, or else drop it."""
        self._refusals = 0
        try:
            self._pending[0]()
        except Exception:  # noqa: BLE001 - it has been logged
            self._drop(0)
        else:
            self._pending.popleft()

    def _drop(self, index: int) -> None:
        del self._pending[index]
        self.count_lost(self.destination)

    @abstractmethod
    def write_record(self, trainer: Trainer, record: Record) -> None:
        """Write a record, as a whole: if it raises, it is called again with the same record.

        Args:
            trainer: the trainer that published it.
            record: its `step` is the iteration; its `values`, at least one, are floats by tag.
        """

    @abstractmethod
    def close_destination(self, trainer: Trainer) -> None:
        """Close the destination if it is open."""
