"""A sink for TensorBoard: `tensorboard --logdir runs`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import attrs
from ignite.engine import Events

from diptych.engine.evaluator import EvaluatesModel
from diptych.engine.events import RunEvents
from diptych.handlers.files import make_folder
from diptych.handlers.run_directory import absolute
from diptych.handlers.sinks.charts import Chart, charts_of, custom_scalars_layout
from diptych.handlers.sinks.hyperparameters import hyperparameters, session_end, session_start
from diptych.handlers.sinks.markdown_tables import findings_list, identity_table, model_table
from diptych.handlers.sinks.run_record import run_settings
from diptych.handlers.sinks.sink import Sink

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from diptych.engine.metrics.metrics_collector import Record
    from diptych.engine.trainer import Trainer
    from diptych.handlers.output.appended_file import AppendedFile
    from diptych.handlers.sinks.event_file import DirectSummaryWriter, EventFile

FIT = "fit"
"""The first part of the tags of evaluations and of the training loss, which share charts: the first
group of TensorBoard's first tab, which orders groups by name and unfolds the first two."""


def tensorboard_command(directory: str | os.PathLike[str]) -> str:
    """Return the command that shows a directory in TensorBoard, for the user's own shell.

    Outside an activated environment the program has the path of this interpreter's.
    """
    program = Path("tensorboard")
    if shutil.which(program) is None:
        program = Path(sys.executable).with_name(program.name)
        if program.is_relative_to(Path.cwd()):
            program = program.relative_to(Path.cwd())
    return shlex.join([str(program), "--logdir", os.fspath(directory)])


@attrs.define(eq=False)
class TensorBoard(Sink):
    """Writes every record as scalars, and the settings, model and findings of the run.

    Each evaluation is a run of its own in TensorBoard, so that it has its own colour: `val/loss` is
    the tag `fit/loss` of the run `<run>/val`, in the folder `val`. It shares a chart with the
    training loss, which is `fit/loss` here too. All other tags are those of the records.

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
    Cost: about 60 microseconds a record, which is in its file when the handler returns; a
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
    _prefixes: list[str] = attrs.field(factory=list, init=False, repr=False)
    _evaluations: dict[str, EventFile] = attrs.field(factory=dict, init=False, repr=False)
    _continued: set[str] = attrs.field(factory=set, init=False, repr=False)
    _first_step: int | None = attrs.field(default=None, init=False, repr=False)

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
        missing = super().unwritten
        files = [self._events, *(events.file for events in self._evaluations.values())]
        for file in files:
            if file is not None and file.unwritten:
                missing[str(file.path)] = file.unwritten
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
        """Close the files; the next use of `writer` opens another one.

        If events wait because they cannot be written, the next use continues with the same file.
        """
        if self._writer is not None and self._is_done(self._writer.event_file):
            self._writer = None
        for name, events in list(self._evaluations.items()):
            if self._is_done(events):
                del self._evaluations[name]

    def _is_done(self, events: EventFile | None) -> bool:
        """Close a file; return whether nothing waits for it."""
        if events is None:
            return True
        events.close()
        if events.file.waiting:
            return False
        if events.file.dropped:
            self.count_lost(str(events.file.path), events.file.dropped)
        return True

    def listen(self, trainer: Trainer) -> None:
        """Write each record; describe the run when it starts."""
        super().listen(trainer)
        trainer.add_event_handler(RunEvents.RESTORE, self._find_evaluations)
        trainer.add_event_handler(Events.STARTED, self._start)

    def _find_evaluations(self, trainer: Trainer) -> None:
        prefixes = {handler.prefix for handler in trainer.handlers_of(EvaluatesModel)}
        self._prefixes = sorted(filter(_is_inside, prefixes), key=len, reverse=True)
        self._continued.clear()
        self._first_step = None

    def _start(self, trainer: Trainer) -> None:
        with self.tolerated(starting=True):
            make_folder(self.directory)
        iteration, settings = trainer.state.iteration, run_settings(trainer)
        # If another handler has written at this start already, its points must stay.
        self._first_step = iteration + 1 if iteration else 0
        _discard_from(self._run_events, iteration + 1 if iteration or self._writer else 0)
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
        for run, values in self._by_run(record.values).items():
            summary = [Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
            events = self._evaluation(run, record.step) if run else self._run_events
            events.add_summary(Summary(value=summary), record.step)
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
            self.writer.add_text("findings", findings_list(findings), findings[-1].step)
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

    def _by_run(self, values: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Return values by the name of their evaluation, "" for the others, then by their tag."""
        runs: dict[str, dict[str, float]] = {}
        for tag, value in values.items():
            run = next((name for name in self._prefixes if tag.startswith(f"{name}/")), "")
            shared = tag[len(run) + 1 :] if run else "loss" if tag == "train/loss" else ""
            runs.setdefault(run, {})[f"{FIT}/{shared}" if shared else tag] = value
        return runs

    @property
    def _run_events(self) -> EventFile:
        return self._opened_writer().get_event_file()

    def _evaluation(self, name: str, step: int) -> EventFile:
        """Return the file of an evaluation, opened if it is not, for a record of a step."""
        from diptych.handlers.sinks.event_file import EventFile  # noqa: PLC0415

        if name not in self._evaluations:
            folder = str(self.directory / name)
            self._evaluations[name] = EventFile(folder, self.tolerated)
        if name not in self._continued:  # earlier files may hold points after the checkpoint
            self._continued.add(name)
            start = step if self._first_step is None else min(step, self._first_step)
            _discard_from(self._evaluations[name], start)
        return self._evaluations[name]

    def _add(self, summary: Any, step: int) -> None:
        self._run_events.add_summary(summary, step)


def _discard_from(events: EventFile, step: int) -> None:
    """Tell TensorBoard to discard the points of earlier files from a step on."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # noqa: PLC0415

    events.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)


def _is_inside(prefix: str) -> bool:
    """Return whether a prefix is the path of a folder inside another one."""
    path = PurePosixPath(prefix)
    is_own = bool(path.parts) and path.as_posix() == prefix  # "." is the run's own folder
    return is_own and not path.is_absolute() and ".." not in path.parts
