"""The run's values as lines of JSON: the same bytes however often the run was interrupted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import attrs
from ignite.engine import Events

from diptych.engine.distributed.collectives import rank
from diptych.engine.errors import ResumeError
from diptych.engine.events import MetricsEvents, RunEvents
from diptych.engine.metrics.metrics_collector import Record
from diptych.handlers.files import make_folder

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

MEASURED = ("time/", "memory/")
"""Beginnings of the tags whose values depend on the machine and the hour: no two runs agree on
them."""

ENCODER = json.JSONEncoder(allow_nan=False)


def _file_in(path: Path | str) -> Path:
    path = Path(path).absolute()  # the working directory may change while the run goes on
    return path if path.suffix == ".jsonl" else path / "metrics.jsonl"


@attrs.define(eq=False)
class JsonLines:
    """Writes every record as a line `{"step": 50, "train/loss": 0.5, ...}`, its tags sorted.

    A run that was interrupted and resumed from a checkpoint leaves the same bytes in `path` as the
    run that nobody touched: what was written after the checkpoint is cut off when the run goes on.
    Measured values (`time/...`, `memory/...`) cannot be the same, so they are kept apart in
    `measured_path`, in lines of the same form. A run that starts from its beginning starts both
    files anew. NaN and infinities, which JSON lacks, are the strings "NaN", "Infinity" and
    "-Infinity"; `read_records` turns them back, as `float` does.

    Event: `MetricsEvents.LOGGED`; `STARTED` cuts the files, `RELEASE` closes them. Rank 0 alone
    writes.
    Cost: some 30 microseconds a record, which is in the file when the handler returns.

    Args:
        path: of the file, ending in .jsonl, or of the folder in which it is `metrics.jsonl`.
    """

    path: Path = attrs.field(converter=_file_in)
    _started: bool = attrs.field(default=False, init=False, repr=False)
    _running: bool = attrs.field(default=False, init=False, repr=False)
    _waiting: list[Record] = attrs.field(factory=list, init=False, repr=False)
    _resumed_sizes: dict[str, int] | None = attrs.field(default=None, init=False, repr=False)
    _open: dict[Path, BinaryIO] = attrs.field(factory=dict, init=False, repr=False)

    @property
    def measured_path(self) -> Path:
        """The file of measured values: `metrics.measured.jsonl`."""
        return self.path.with_suffix(".measured.jsonl")

    def attach(self, trainer: Trainer) -> None:
        """Write each record of the trainer."""
        if rank() == 0:
            trainer.add_event_handler(Events.STARTED, self._start)
            trainer.add_event_handler(MetricsEvents.LOGGED, self._log)
            trainer.add_event_handler(RunEvents.RELEASE, self._close)

    def state_dict(self) -> dict[str, int]:
        """Return how many bytes of each file belong to the run so far; they are on the disk."""
        for file in self._open.values():
            os.fsync(file.fileno())
        return {name: _size(path) for name, path in self._files().items()}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on from a state that `state_dict` returned: the next run cuts the files to it.

        Nothing is cut before training goes on, so that loading an old checkpoint to look at it
        loses nothing.
        """
        self._resumed_sizes = dict(state_dict)

    def _files(self) -> dict[str, Path]:
        return {"values": self.path, "measured": self.measured_path}

    def _start(self, trainer: Trainer) -> None:
        self._close()
        make_folder(self.path.parent)
        sizes = self._resumed_sizes
        if sizes is not None:
            self._waiting.clear()  # the run that is continued has logged its start already
        elif trainer.state.iteration == 0:
            sizes = dict.fromkeys(self._files(), 0)
        for name, size in (sizes or {}).items():
            _cut(self._files()[name], size)
        self._resumed_sizes = None
        self._started = self._running = True
        for record in self._waiting:
            self._write(record)
        self._waiting.clear()

    def _log(self, trainer: Trainer) -> None:
        # Where a run starts is not decided before STARTED, nor is what the files keep.
        if self._started:
            self._write(trainer.metrics.record)
        else:
            self._waiting.append(trainer.metrics.record)

    def _write(self, record: Record) -> None:
        measured = {tag: v for tag, v in record.values.items() if tag.startswith(MEASURED)}
        values = {tag: v for tag, v in record.values.items() if tag not in measured}
        for path, part in ((self.path, values), (self.measured_path, measured)):
            if part:
                self._file(path).write(_line(record.step, part))
        if not self._running:
            self._close()

    def _file(self, path: Path) -> BinaryIO:
        """Return the file, which stays open while the run goes on.

        Opening it costs as much as writing a line.
        """
        if path not in self._open:
            self._open[path] = path.open("ab", buffering=0)
        return self._open[path]

    def _close(self, _: Trainer | None = None) -> None:
        self._running = False
        for file in self._open.values():
            file.close()
        self._open.clear()


def read_records(path: Path | str) -> list[Record]:
    """Return the records in a file of `JsonLines`; a last line that is incomplete is left out.

    Args:
        path: of the file, or of the folder in which it is `metrics.jsonl`.
    """
    records = []
    for line in _file_in(path).read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            values = json.loads(line)
            step = values.pop("step")
            records.append(Record(step, {tag: float(value) for tag, value in values.items()}))
    return records


def json_number(value: float) -> float | str:
    """Return a number as JSON can hold it: a string in place of NaN and the infinities."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _line(step: int, values: Mapping[str, float]) -> bytes:
    if "step" in values:
        raise ValueError("a tag must not be 'step', the name of the iteration in every line")
    sorted_values = {tag: json_number(values[tag]) for tag in sorted(values)}
    return ENCODER.encode({"step": step, **sorted_values}).encode() + b"\n"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cut(path: Path, size: int) -> None:
    """Keep the first bytes of a file; one that is not there any more is begun anew."""
    if not path.exists():
        return
    if _size(path) < size:
        raise ResumeError(
            f"{path} must hold the {size} bytes that it had at the checkpoint, got {_size(path)}: "
            "it has been changed since; move it away to go on with a new one"
        )
    os.truncate(path, size)
