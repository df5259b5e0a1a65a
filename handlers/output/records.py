"""Reading of the files that describe a run: its records, and its identity."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import attrs

from diptych.engine.metrics.metrics_collector import Record
from diptych.engine.state.run_identity import RunIdentity
from diptych.handlers.output.line_chain import LineChain
from diptych.handlers.output.sealed_json import read_file, read_sealed, unreadable
from diptych.handlers.run_directory import metrics_file

logger = logging.getLogger(__name__)

EXCERPT = 60  # bytes of a damaged line that an error shows
DIGEST = ".digest.json"


@attrs.define(eq=False)
class RecordReader:
    """Reads a file of records from where it has read before.

    Attributes:
        path: of the file.
        rest: an incomplete last line, once all records were read.
    """

    path: Path
    rest: bytes = attrs.field(default=b"", init=False)
    _offset: int = attrs.field(default=0, init=False)
    _lines: int = attrs.field(default=0, init=False)

    @property
    def is_behind(self) -> bool:
        """Whether the file is shorter than what was read: another one has taken its place."""
        return bool(self._offset) and (
            not self.path.is_file() or self.path.stat().st_size < self._offset
        )

    def new_records(self) -> Iterator[Record]:
        """Yield the records that were appended since the last call, of which a file may hold many.

        Raises:
            OSError: naming the file, if it cannot be read.
            ValueError: naming file and line, if a line is not a record.
        """
        self.rest = b""
        for line in io.BytesIO(read_file(self.path, self._offset)):
            if not line.endswith(b"\n"):
                self.rest = line
                return
            record = _record(line[:-1], self.path, self._lines + 1)
            self._lines += 1
            self._offset += len(line)
            yield record


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Return the records in a file of `JsonLines`.

    An incomplete last line, which a killed process leaves, is left out; this is logged.

    Args:
        path: of the file, or of the run directory, where it is `metrics.jsonl`.

    Raises:
        OSError: naming the file, if it cannot be read.
        ValueError: naming file and line, if a line has changed since it was written, or is not a
            record.
    """
    check_lines(metrics_file(path))
    reader = RecordReader(metrics_file(path))
    records = [*reader.new_records()]
    if reader.rest:
        logger.warning(
            "%s ends inside line %d, which is left out: its end was not written.",
            reader.path,
            len(records) + 1,
        )
    return records


def digest_file(path: Path) -> Path:
    """Return the file of digests that belongs to a file of records: `metrics.digest.json`."""
    return path.with_name(f"{path.name.removesuffix('.jsonl').removesuffix('.measured')}{DIGEST}")


def check_lines(path: Path) -> None:
    """Compare the lines of a file of records with their digest, if there is one.

    Raises:
        OSError: naming the file, if one cannot be read.
        ValueError: naming file and line, if a line has changed since it was written.
    """
    digests = digest_file(path)
    if not (path.is_file() and digests.is_file()):
        return
    state = read_sealed(digests, without="the lines are then not verified").get(path.name)
    if state is None:
        return
    chain = LineChain()
    chain.load_state_dict(state)
    try:
        damage = chain.damage(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if damage is not None:
        raise ValueError(
            f"{path} must hold the lines that were written, but {damage}. Restore the file from a "
            f"copy, or remove {digests.name} to read the lines as they are."
        )


def read_identity(path: Path) -> RunIdentity | None:
    """Return the identity in `identity.json`; None if there is no such file.

    Raises:
        OSError: naming the file, if it cannot be read.
        ValueError: naming the file, if it is damaged.
    """
    try:
        content = read_sealed(path, without="the runs' settings are then compared")
        return RunIdentity.from_json(json.dumps(content))
    except FileNotFoundError:
        return None
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{path} must hold the identity of a run: {error}. Remove it.") from error


def _record(line: bytes, path: Path, number: int) -> Record:
    try:
        values = json.loads(line)
        step = values.pop("step")
        if type(step) is not int or any(type(v) not in {int, float, str} for v in values.values()):
            raise ValueError("a value has another type")  # noqa: TRY301 - all faults of a line
        float(step)  # a chart needs it
        "".join(values).encode()  # half a character can be escaped
        return Record(step, {tag: float(value) for tag, value in values.items()})
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        shown = line if len(line) <= EXCERPT else line[:EXCERPT] + b"..."
        raise ValueError(
            f'{path}, line {number}, must be a record such as {{"step": 50, "train/loss": 0.5}}, '
            f"got {shown.decode(errors='replace')!r} ({type(error).__name__}: {error}). Restore "
            "the file from a copy, or remove the line."
        ) from error
