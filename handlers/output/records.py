"""Reading of the files that `JsonLines` writes."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import attrs

from diptych.engine.metrics.metrics_collector import Record
from diptych.handlers.run_directory import metrics_file

logger = logging.getLogger(__name__)

EXCERPT = 60  # bytes of a damaged line that an error shows


@attrs.define(eq=False)
class RecordReader:
    """Reads a file of records from where it has read before.

    Attributes:
        path: of the file.
    """

    path: Path
    _offset: int = attrs.field(default=0, init=False)
    _lines: int = attrs.field(default=0, init=False)

    def new_records(self) -> tuple[list[Record], bytes]:
        """Return the records that were appended since the last call, and an incomplete last line.

        Raises:
            OSError: if the file cannot be read.
            ValueError: naming file and line, if a line is not a record.
        """
        with self.path.open("rb") as file:
            file.seek(self._offset)
            *lines, rest = file.read().split(b"\n")
        records = []
        for line in lines:
            records.append(_record(line, self.path, self._lines + 1))
            self._lines += 1
            self._offset += len(line) + 1
        return records, rest


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Return the records in a file of `JsonLines`.

    An incomplete last line, which a killed process leaves, is left out; this is logged.

    Args:
        path: of the file, or of the run directory, where it is `metrics.jsonl`.

    Raises:
        OSError: if the file cannot be read.
        ValueError: naming file and line, if a line is not a record.
    """
    reader = RecordReader(metrics_file(path))
    records, rest = reader.new_records()
    if rest:
        logger.warning(
            "%s ends inside line %d, which is left out: its end was not written.",
            reader.path,
            len(records) + 1,
        )
    return records


def _record(line: bytes, path: Path, number: int) -> Record:
    try:
        values = json.loads(line)
        step = values.pop("step")
        if type(step) is not int or any(type(v) not in {int, float, str} for v in values.values()):
            raise ValueError("a value has another type")  # noqa: TRY301 - all faults of a line
        return Record(step, {tag: float(value) for tag, value in values.items()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        shown = line if len(line) <= EXCERPT else line[:EXCERPT] + b"..."
        raise ValueError(
            f'{path}, line {number}, must be a record such as {{"step": 50, "train/loss": 0.5}}, '
            f"got {shown.decode(errors='replace')!r} ({type(error).__name__}: {error}). Restore "
            "the file from a copy, or remove the line."
        ) from error
