"""A sink that writes records as lines of JSON, and the function that reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import attrs
from ignite.engine import Events

from diptych.engine.errors import ResumeError
from diptych.engine.metrics.metrics_collector import Record
from diptych.handlers.files import make_folder
from diptych.handlers.run_directory import METRICS, measured_file, metrics_file
from diptych.handlers.sinks.json_values import json_number
from diptych.handlers.sinks.sink import Sink

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

MEASURED_TAGS = ("time/", "memory/")
"""Beginnings of the tags whose values depend on the machine and differ from run to run."""

ENCODER = json.JSONEncoder(allow_nan=False)


@attrs.define(eq=False)
class JsonLines(Sink):
    """Writes every record as a line `{"step": 50, "train/loss": 0.5, ...}`, its tags sorted.

    A run that was interrupted and resumed from a checkpoint leaves the same bytes in `path` as an
    uninterrupted run: lines written after the checkpoint are removed when the run resumes. Measured
    values (`time/...`, `memory/...`) differ from run to run, so they go to `measured_path`, in the
    same format. A run that starts at iteration 0 empties both files. JSON has no NaN and no
    infinities: they are the strings "NaN", "Infinity" and "-Infinity", which `read_records`
    converts back.

    Event: `STARTED`, `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Writes on rank 0 only.
    Cost: about 30 microseconds a record, which is in the file when the handler returns.

    Args:
        path: of the file, ending in .jsonl, or of the run directory, where it is `metrics.jsonl`.
    """

    path: Path = attrs.field(converter=metrics_file)
    _has_started: bool = attrs.field(default=False, init=False, repr=False)
    _early_records: list[Record] = attrs.field(factory=list, init=False, repr=False)
    _resumed_sizes: dict[str, int] | None = attrs.field(default=None, init=False, repr=False)
    _open: dict[Path, BinaryIO] = attrs.field(factory=dict, init=False, repr=False)

    @property
    def measured_path(self) -> Path:
        """The file of measured values: `metrics.measured.jsonl`."""
        return measured_file(self.path)

    @property
    def role(self) -> str:
        """The name of the file; "" for `metrics.jsonl`."""
        return "" if self.path.name == METRICS else self.path.name

    def state_dict(self) -> dict[str, int]:
        """Return the size of each file, in bytes that have been flushed to the disk."""
        for file in self._open.values():
            os.fsync(file.fileno())
        return {name: _size(path) for name, path in self._files().items()}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Load a state that `state_dict` returned; the next run truncates the files to it.

        Loading alone truncates nothing, so you can load an old checkpoint to inspect it.
        """
        self._resumed_sizes = dict(state_dict)

    def _files(self) -> dict[str, Path]:
        return {"values": self.path, "measured": self.measured_path}

    def listen(self, trainer: Trainer) -> None:
        """Write each record; truncate the files when a run starts."""
        super().listen(trainer)
        trainer.add_event_handler(Events.STARTED, self._start)

    def _start(self, trainer: Trainer) -> None:
        self.close_destination(trainer)
        make_folder(self.path.parent)
        sizes = self._resumed_sizes
        if sizes is not None:
            self._early_records.clear()  # the file holds those of the start already
        elif trainer.state.iteration == 0:
            sizes = dict.fromkeys(self._files(), 0)
        for name, size in (sizes or {}).items():
            _truncate(self._files()[name], size)
        self._resumed_sizes = None
        self._has_started = True
        for record in self._early_records:
            self.write_record(trainer, record)
        self._early_records.clear()

    def write_record(self, _: Trainer, record: Record) -> None:
        """Append a line to each file that gets one of the values."""
        if not self._has_started:  # until STARTED, how much of the files to keep is unknown
            self._early_records.append(record)
            return
        measured = {tag: v for tag, v in record.values.items() if tag.startswith(MEASURED_TAGS)}
        values = {tag: v for tag, v in record.values.items() if tag not in measured}
        for path, part in ((self.path, values), (self.measured_path, measured)):
            if part:
                if path not in self._open:  # opening costs as much as writing a line
                    self._open[path] = path.open("ab", buffering=0)
                self._open[path].write(_line(record.step, part))

    def close_destination(self, _: Trainer) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Return the records in a file of `JsonLines`, without an incomplete last line.

    Args:
        path: of the file, or of the run directory, where it is `metrics.jsonl`.
    """
    records = []
    for line in metrics_file(path).read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            values = json.loads(line)
            step = values.pop("step")
            records.append(Record(step, {tag: float(value) for tag, value in values.items()}))
    return records


def _line(step: int, values: Mapping[str, float]) -> bytes:
    if "step" in values:
        raise ValueError(
            "a tag must not be 'step', the key of the iteration in each line. Rename the metric."
        )
    sorted_values = {tag: json_number(values[tag]) for tag in sorted(values)}
    return ENCODER.encode({"step": step, **sorted_values}).encode() + b"\n"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _truncate(path: Path, size: int) -> None:
    """Keep the first bytes of a file; a missing file stays missing."""
    if not path.exists():
        return
    if _size(path) < size:
        raise ResumeError(
            f"{path} must hold at least the {size} bytes of the checkpoint, got {_size(path)}: it "
            "has been changed since. Move it away to resume with a new file."
        )
    os.truncate(path, size)
