"""A sink for TensorBoard: `tensorboard --logdir runs`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from ignite.engine import Events

from diptych.handlers.files import make_folder
from diptych.handlers.run_directory import absolute
from diptych.handlers.sinks.charts import Chart, charts_of, custom_scalars_layout
from diptych.handlers.sinks.hyperparameters import hyperparameters, session_end, session_start
from diptych.handlers.sinks.markdown_tables import findings_table, identity_table, model_table
from diptych.handlers.sinks.run_record import run_settings
from diptych.handlers.sinks.sink import Sink

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from diptych.engine.metrics.metrics_collector import Record
    from diptych.engine.trainer import Trainer
    from diptych.handlers.output.appended_file import AppendedFile
    from diptych.handlers.sinks.event_file import DirectSummaryWriter


@attrs.define(eq=False)
class TensorBoard(Sink):
    """Writes every record as scalars, and the settings, model and findings of the run.

    - Custom Scalars: curves that are read together share a chart, under "Does it learn?", "How
      fast?" and "Is it healthy?"; see `diptych.handlers.sinks.charts`. A chart appears with its
      first curve.
    - HParams: a row for each run, with its settings and the last value of each scalar.
    - Text: `settings` with versions, `model` with its parameters by component, `findings` of
      `RepresentationHealth` and `Throughput`, and at the end `listeners`, the table that
      `trainer.describe()` returns.

    TensorBoard keeps scalars as float32. A resumed run writes another file into the directory and
    tells TensorBoard to discard the points after the checkpoint, so no point is double. A handler
    that shows anything else (images, histograms) writes to `writer`. What cannot be written (a full
    disk) is kept in memory, up to 32 MiB, and written later; a part of an event is removed.

    Event: `STARTED`, `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Writes on rank 0 only.
    Cost: about 60 microseconds a record, which is in the file when the handler returns; a
        millisecond for the layout if a record has new tags; half a second for the import when the
        run starts.

    Args:
        directory: of the event files; created if missing.
    """

    directory: Path = attrs.field(converter=absolute)
    _writer: DirectSummaryWriter | None = attrs.field(default=None, init=False, repr=False)
    _tags: set[str] = attrs.field(factory=set, init=False, repr=False)
    _charts: tuple[Chart, ...] = attrs.field(default=(), init=False, repr=False)
    _findings: int = attrs.field(default=0, init=False, repr=False)

    @property
    def writer(self) -> SummaryWriter:
        """The writer, for handlers on rank 0; opened if it is closed.

        An error of its file is logged, not raised.
        """
        return self._opened_writer()

    def _opened_writer(self) -> DirectSummaryWriter:
        if self._writer is None:
            # Imported here: it takes longer than the rest of the library.
            from diptych.handlers.sinks.event_file import DirectSummaryWriter  # noqa: PLC0415

            self._writer = DirectSummaryWriter(str(self.directory), self.tolerated)
        return self._writer

    @property
    def destination(self) -> str:
        """The directory."""
        return f"a record to {self.directory}"

    @property
    def unwritten(self) -> dict[str, int]:
        """The number of events that are not written, by file."""
        missing, events = super().unwritten, self._events
        if events is not None and events.unwritten:
            missing[str(events.path)] = events.unwritten
        return missing

    @property
    def _events(self) -> AppendedFile | None:
        """The file if it is open, or events wait for it."""
        file = None if self._writer is None else self._writer.event_file
        return None if file is None else file.file

    @contextmanager
    def open_writer(self) -> Iterator[SummaryWriter]:
        """Provide the writer; close the file afterwards if the run is over."""
        yield self.writer
        if self._run_is_over:
            self.close()

    def close(self) -> None:
        """Close the file; the next use of `writer` opens another one.

        If events wait because they cannot be written, the next use continues with this file.
        """
        if self._writer is not None:
            if self._writer.event_file is not None:
                self._writer.event_file.close()
            events = self._events
            if events is None or not events.waiting:
                if events is not None and events.dropped:
                    self.count_lost(str(events.path), events.dropped)
                self._writer = None

    def listen(self, trainer: Trainer) -> None:
        """Write each record; describe the run when it starts."""
        super().listen(trainer)
        trainer.add_event_handler(Events.STARTED, self._start)

    def _start(self, trainer: Trainer) -> None:
        with self.tolerated(starting=True):
            make_folder(self.directory)
        iteration, settings = trainer.state.iteration, run_settings(trainer)
        # If another handler has written at this start already, its points must stay.
        self._discard_from(iteration + 1 if iteration or self._writer else 0)
        text = json.dumps(settings, indent=2)
        self.writer.add_text("settings", f"```json\n{text}\n```", iteration)
        self.writer.add_text("identity", identity_table(trainer.identity), iteration)
        self.writer.add_text("model", model_table(trainer.model, trainer.loss), iteration)
        self._add(session_start(hyperparameters(settings, trainer.handlers)), iteration)
        # A resumed run keeps the charts of the evaluations that it will repeat.
        self._tags, self._charts, self._findings = set(trainer.state.metrics), (), 0

    def write_record(self, trainer: Trainer, record: Record) -> None:
        """Write the scalars, and new charts and findings."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415

        # One event for all values takes a tenth of the time of calls of add_scalar.
        values = [Summary.Value(tag=tag, simple_value=v) for tag, v in record.values.items()]
        self._add(Summary(value=values), record.step)
        self._show_charts(record.values, record.step)
        self._show_findings(trainer)

    def close_destination(self, trainer: Trainer) -> None:
        """Write the listeners and the end of the session, and close the file."""
        if self._writer is not None and not self._run_is_over:
            self._show_findings(trainer)
            self._writer.add_text("listeners", trainer.describe(), trainer.state.iteration)
            if trainer.is_finished:
                self._add(session_end(), trainer.state.iteration)
        self.close()

    def _show_findings(self, trainer: Trainer) -> None:
        findings = trainer.findings
        if len(findings) > self._findings:
            self.writer.add_text("findings", findings_table(findings), findings[-1].step)
            self._findings = len(findings)

    def _show_charts(self, tags: Iterable[str], step: int) -> None:
        """Write the layout again if a new tag is the first curve of a chart."""
        if self._tags.issuperset(tags):
            return
        self._tags.update(tags)
        charts = charts_of(self._tags)
        if charts != self._charts:
            from torch.utils.tensorboard.summary import custom_scalars  # noqa: PLC0415

            self._charts = charts
            self._add(custom_scalars(custom_scalars_layout(charts)), step)

    def _discard_from(self, step: int) -> None:
        """Tell TensorBoard to discard the points of earlier files from a step on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # noqa: PLC0415

        start = Event(session_log=SessionLog(status=SessionLog.START))
        self._opened_writer().get_event_file().add_event(start, step)

    def _add(self, summary: Any, step: int) -> None:
        self._opened_writer().get_event_file().add_summary(summary, step)
