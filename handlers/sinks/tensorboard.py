"""The run's values in TensorBoard: `tensorboard --logdir runs`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from ignite.engine import Events

from diptych.engine.distributed.collectives import rank
from diptych.engine.events import MetricsEvents
from diptych.handlers.sinks.hyperparameters import hyperparameters, session_end, session_start
from diptych.handlers.sinks.run_directory import run_settings
from diptych.handlers.sinks.run_texts import findings_of, findings_table, model_table
from diptych.handlers.sinks.tensorboard_layout import Chart, charts_of, layout_summary

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from diptych.engine.trainer import Trainer

AT_THE_END = (Events.COMPLETED, Events.INTERRUPT, Events.EXCEPTION_RAISED)


@attrs.define(eq=False)
class TensorBoard:
    """Writes every record as scalars, and what else tells how a run fares.

    - Custom Scalars: the curves that are read together in one chart, under "Does it learn?", "How
      fast?" and "Is it healthy?": see `diptych.handlers.sinks.tensorboard_layout`. A chart is there as soon as one
      of its curves is.
    - HParams: a row for each run with its settings and the last value of each scalar.
    - Text: `settings` with versions, `model` with its parameters by component, `findings` of
      `RepresentationHealth` and `Throughput`, and at the end `listeners`, what
      `trainer.describe()` returns.

    TensorBoard keeps scalars as float32. A resumed run writes a further file into the folder and
    tells TensorBoard to forget what came after the checkpoint, so that no point is double. A
    handler that shows anything else (images, histograms, a layout of the charts) takes `writer`.

    Event: `MetricsEvents.LOGGED`; `STARTED` opens the file and `COMPLETED`, `INTERRUPT` or
        `EXCEPTION_RAISED` closes it. Rank 0 alone writes.
    Cost: some 60 microseconds a record, which is in the file when the handler returns; where a
        record has new tags, a millisecond for the layout; half a second for the import when the
        run starts.

    Args:
        directory: of the event files; made if it is not there.
    """

    directory: Path = attrs.field(converter=Path)
    _writer: SummaryWriter | None = attrs.field(default=None, init=False, repr=False)
    _ended: bool = attrs.field(default=False, init=False, repr=False)
    _tags: set[str] = attrs.field(factory=set, init=False, repr=False)
    _charts: tuple[Chart, ...] = attrs.field(default=(), init=False, repr=False)
    _findings: int = attrs.field(default=0, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Write each record of the trainer."""
        if rank() == 0:
            trainer.add_event_handler(Events.STARTED, self._start)
            trainer.add_event_handler(MetricsEvents.LOGGED, self._write)

    @property
    def writer(self) -> SummaryWriter:
        """The open writer, for handlers of rank 0; opened where it is not."""
        if self._writer is None:
            # Imported here: it takes longer than the rest of the library.
            from diptych.handlers.sinks.event_file import DirectWriter  # noqa: PLC0415

            self._writer = DirectWriter(self.directory)
        return self._writer

    def close(self) -> None:
        """Close the file; the next use of `writer` opens a further one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _start(self, trainer: Trainer) -> None:
        for event in AT_THE_END:
            # Added now, so that it comes after whatever the other handlers write at the end.
            if trainer.has_event_handler(self._end, event):
                trainer.remove_event_handler(self._end, event)
            trainer.add_event_handler(event, self._end)
        iteration = trainer.state.iteration
        # What another handler has written at this start stays.
        self._forget(iteration + 1 if iteration or self._writer else 0)
        self._show_settings(trainer)
        # A resumed run keeps the charts of evaluations that are to come again.
        self._tags, self._charts, self._findings = set(trainer.state.metrics), (), 0
        self._ended = False

    def _end(self, trainer: Trainer, *_: object) -> None:
        self._ended = True
        self._show_findings(trainer)
        self.writer.add_text("listeners", trainer.describe(), trainer.state.iteration)
        if trainer.is_finished:
            self._add_summary(session_end(), trainer.state.iteration)
        self.close()

    def _show_settings(self, trainer: Trainer) -> None:
        iteration, settings = trainer.state.iteration, run_settings(trainer)
        text = json.dumps(settings, indent=2)
        self.writer.add_text("settings", f"```json\n{text}\n```", iteration)
        self.writer.add_text("model", model_table(trainer), iteration)
        self._add_summary(session_start(hyperparameters(settings)), iteration)

    def _show_findings(self, trainer: Trainer) -> None:
        findings = findings_of(trainer)
        if len(findings) > self._findings:
            self.writer.add_text("findings", findings_table(findings), findings[-1].step)
            self._findings = len(findings)

    def _show_charts(self, tags: Iterable[str], step: int) -> None:
        """Lay out the charts, where a new tag has given one of them its first curve."""
        if self._tags.issuperset(tags):
            return
        self._tags.update(tags)
        charts = charts_of(self._tags)
        if charts != self._charts:
            self._charts = charts
            self._add_summary(layout_summary(charts), step)

    def _forget(self, step: int) -> None:
        """Tell TensorBoard that the points of earlier files from this step on do not count."""
        event = self._new_event()
        event.session_log.status = event.session_log.START
        self._add(event, step)

    def _write(self, trainer: Trainer) -> None:
        # All values in one event, without a call of add_scalar for each: a tenth of the time.
        event, record = self._new_event(), trainer.metrics.record
        for tag, value in record.values.items():
            event.summary.value.add(tag=tag, simple_value=value)
        self._add(event, record.step)
        self._show_charts(record.values, record.step)
        self._show_findings(trainer)
        if self._ended:
            self.close()

    def _new_event(self) -> Any:
        from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415

        return Event()

    def _add_summary(self, summary: Any, step: int) -> None:
        event = self._new_event()
        event.summary.CopyFrom(summary)
        self._add(event, step)

    def _add(self, event: Any, step: int) -> None:
        file_writer: Any = self.writer.file_writer
        file_writer.add_event(event, step)


def attach_board_of(handler: Any, trainer: Trainer) -> None:
    """Attach the `board` of a handler that has one of its own; one that is attached stays so."""
    if handler.board is not None and handler.board not in trainer.handlers:
        trainer.attach(handler.board)


def board_of(trainer: Trainer, handler: Any) -> TensorBoard:
    """Return the board on which a handler shows something: its own `board`, or the attached one.

    Raises:
        ValueError: if there is none.
    """
    boards = [handler.board, *trainer.handlers]
    board = next((board for board in boards if isinstance(board, TensorBoard)), None)
    if board is None:
        raise ValueError(
            f"{type(handler).__name__} needs a TensorBoard among the trainer's handlers, got none: "
            "attach TensorBoard(run_dir) or default_handlers(run_dir)"
        )
    return board
