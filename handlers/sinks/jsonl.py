"""A sink that writes records as lines of JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
from ignite.engine import Events

from diptych.engine.errors import ResumeError
from diptych.handlers.argument_checks import one_of
from diptych.handlers.files import make_folder, write_atomically
from diptych.handlers.output.appended_file import AppendedFile
from diptych.handlers.output.line_chain import LineChain
from diptych.handlers.output.records import digest_file
from diptych.handlers.output.sealed_json import sealed
from diptych.handlers.run_directory import METRICS, measured_file, metrics_file
from diptych.handlers.sinks.json_values import json_number
from diptych.handlers.sinks.sink import Sink

if TYPE_CHECKING:
    from diptych.engine.metrics.metrics_collector import Record
    from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)

MEASURED_TAGS = ("time/", "memory/")
"""Beginnings of the tags whose values depend on the machine and differ from run to run."""

ENCODER = json.JSONEncoder(allow_nan=False)
Damaged = Literal["refuse", "set_aside"]


class _RecordFile:
    """One file of records: it grows by lines, and its lines are chained by a digest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chain = LineChain()
        self.file = AppendedFile(path, written=self.chain.add)

    def state_dict(self) -> dict[str, Any]:
        waiting = [line.decode() for line in self.file.waiting]
        return {**self.chain.state_dict(), "waiting": waiting}

    def damage(self, state: Mapping[str, Any] | int) -> str | None:
        """Return where the file differs from a saved state, in words; None if it does not."""
        if not self.path.exists():
            return None
        if isinstance(state, int):
            size = self.path.stat().st_size
            return None if size >= state else f"it has lost {state - size} bytes at its end"
        chain = LineChain()
        chain.load_state_dict(state)
        try:
            return chain.damage(self.path)
        except OSError as error:
            return f"it cannot be read ({error})"

    def set_aside(self, damage: str) -> None:
        """Rename the file to a free name, and log it."""
        number, target = 1, self.path.with_suffix(".damaged.jsonl")
        while target.exists():
            number += 1
            target = self.path.with_suffix(f".damaged-{number}.jsonl")
        self.path.rename(target)
        logger.warning(
            "%s is damaged: %s. It is kept as %s, and the run continues with a new file.",
            self.path,
            damage,
            target.name,
        )

    def log_if_missing(self, state: Mapping[str, Any] | int) -> None:
        """Log that the file is missing, if it had lines."""
        size = state if isinstance(state, int) else state["size"]
        if size and not self.path.exists():
            logger.warning("%s is missing; the run continues with a new file.", self.path)

    def restore(self, state: Mapping[str, Any] | int) -> None:
        """Continue from a saved state, with which the file agrees; a missing file is started again.

        Raises:
            OSError: if the file cannot be read, or not be cut yet.
        """
        waiting = [] if isinstance(state, int) else [line.encode() for line in state["waiting"]]
        if not self.path.exists():
            self.chain = LineChain()
        elif isinstance(state, int):
            self.chain = LineChain.of_file(self.path, state)
        else:
            self.chain.load_state_dict(state)
        self.file = AppendedFile(self.path, written=self.chain.add)
        self.file.keep(waiting)
        self.file.cut(self.chain.size)

    def start(self, *, empty: bool) -> None:
        """Begin an empty file, or continue the one that is there.

        Raises:
            OSError: if the file cannot be read, or not be cut yet.
        """
        if empty:
            self.chain, waiting = LineChain(), list[bytes]()
        else:
            waiting = self.file.waiting
            if self.chain.size != (self.path.stat().st_size if self.path.exists() else 0):
                self.chain = LineChain.of_file(self.path) if self.path.exists() else LineChain()
        self.file = AppendedFile(self.path, written=self.chain.add)
        self.file.keep(waiting)
        self.file.cut(self.chain.size)


@attrs.define(eq=False)
class JsonLines(Sink):
    """Writes every record as a line `{"step": 50, "train/loss": 0.5, ...}`, its tags sorted.

    A run that was interrupted and resumed from a checkpoint leaves the same bytes in `path` as an
    uninterrupted run: lines written after the checkpoint are removed when the run resumes. Measured
    values (`time/...`, `memory/...`) differ from run to run, so they go to `measured_path`, in the
    same format. A run that starts at iteration 0 empties both files. JSON has no NaN and no
    infinities: they are the strings "NaN", "Infinity" and "-Infinity", which `read_records`
    converts back.

    A checkpoint holds a digest of the lines before it. A resumed run compares it with the files, so
    a changed line is an error that names it. The same digest is in `metrics.digest.json`:
    `read_records` and `diptych compare` check the lines with it. A line that cannot be written (a
    full disk) is kept in memory and in the checkpoints, and written later; a part of a line is
    removed.

    Event: `STARTED`, `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Writes on rank 0 only.
    Cost: about 30 microseconds a record, which is in the file when the handler returns; when a run
        resumes, the files are read once. A few milliseconds at a checkpoint.

    Args:
        path: of the file, ending in .jsonl, or of the run directory, where it is `metrics.jsonl`.
        damaged: what happens if a run resumes and lines before its checkpoint have changed.
            "refuse": a `ResumeError` with file and line. "set_aside": the file is renamed to
            `metrics.damaged.jsonl`, and the run continues with a new file; this is logged.

    Raises:
        ValueError: if `damaged` is neither.
        ResumeError: when a run resumes, see `damaged`.
    """

    path: Path = attrs.field(converter=metrics_file)
    damaged: Damaged = attrs.field(default="refuse", validator=one_of(Damaged), kw_only=True)
    _has_started: bool = attrs.field(default=False, init=False, repr=False)
    _early_records: list[Record] = attrs.field(factory=list, init=False, repr=False)
    _resumed: dict[str, Any] | None = attrs.field(default=None, init=False, repr=False)
    _files: dict[str, _RecordFile] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        paths = {"values": self.path, "measured": self.measured_path}
        self._files = {name: _RecordFile(path) for name, path in paths.items()}

    @property
    def measured_path(self) -> Path:
        """The file of measured values: `metrics.measured.jsonl`."""
        return measured_file(self.path)

    @property
    def role(self) -> str:
        """The name of the file; "" for `metrics.jsonl`."""
        return "" if self.path.name == METRICS else self.path.name

    @property
    def destination(self) -> str:
        """The path."""
        return f"a record to {self.path}"

    @property
    def unwritten(self) -> dict[str, int]:
        """The number of lines that are not written, by file."""
        missing = super().unwritten
        for file in (one.file for one in self._files.values() if one.file.unwritten):
            missing[str(file.path)] = file.unwritten
        return missing

    def state_dict(self) -> dict[str, Any]:
        """Return size and digest of each file, flushed to the disk, and the lines that wait."""
        if self._resumed is not None and not self._has_started:
            return self._resumed
        for file in self._files.values():
            with self.tolerated(str(file.path)):
                file.file.flush(durable=True)
        if self._has_started:
            self._write_digests()
        return {name: file.state_dict() for name, file in self._files.items()}

    def _write_digests(self) -> None:
        """Write the digests of the lines, for those who read the files without a checkpoint."""
        path = digest_file(self.path)
        digests = {file.path.name: file.chain.state_dict() for file in self._files.values()}
        with self.tolerated(str(path)):
            write_atomically(path, sealed(json.dumps(digests, indent=2) + "\n", path.name))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned; the next run truncates the files to it.

        Loading alone truncates nothing, so you can load an old checkpoint to inspect it.
        """
        self._resumed = dict(state_dict)

    def listen(self, trainer: Trainer) -> None:
        """Write each record; truncate the files when a run starts."""
        super().listen(trainer)
        trainer.add_event_handler(Events.STARTED, self._start)

    def _start(self, trainer: Trainer) -> None:
        self._close_files()
        with self.tolerated(starting=True):
            make_folder(self.path.parent)
        if self._resumed is None:
            self._remove_digests()
            for file in self._files.values():
                with self.tolerated(str(file.path)):
                    file.start(empty=trainer.state.iteration == 0)
        else:
            self._early_records.clear()  # the file holds those of the start already
            self._check(self._resumed)
            self._remove_digests()
            for name, file in self._files.items():
                with self.tolerated(str(file.path)):
                    file.restore(self._resumed[name])
        self._resumed = None
        self._has_started = True
        if trainer.state.iteration:
            self._write_digests()
        for record in self._early_records:
            self.write_record(trainer, record)
        self._early_records.clear()

    def _remove_digests(self) -> None:
        """Remove the digests, before lines are cut off that they include."""
        with self.tolerated(str(digest_file(self.path))):
            digest_file(self.path).unlink(missing_ok=True)

    def _check(self, states: Mapping[str, Any]) -> None:
        """Compare the files with the states of a checkpoint; set aside those that differ."""
        damages = {name: file.damage(states[name]) for name, file in self._files.items()}
        if any(isinstance(state, int) for state in states.values()):
            logger.warning(
                "The checkpoint has no digest of the lines in %s; they are not verified.", self.path
            )
        for name, damage in damages.items():
            file = self._files[name]
            if damage is None:
                file.log_if_missing(states[name])
            elif self.damaged == "set_aside":
                file.set_aside(damage)
            else:
                raise ResumeError(
                    f"{file.path} must hold the lines that it held when the checkpoint was saved, "
                    f"but {damage}. Restore it from a copy. Or resume with a new file: move it "
                    f"away, or pass JsonLines({str(self.path)!r}, damaged='set_aside')."
                )

    def write_record(self, trainer: Trainer, record: Record) -> None:
        """Append a line to each file that gets one of the values."""
        resumes = self._resumed is not None and not self._run_is_over
        if resumes and trainer.is_finished:  # it fires COMPLETED alone, without STARTED
            self._start(trainer)
        if not self._has_started:  # until STARTED, how much of the files to keep is unknown
            self._early_records.append(record)
            return
        measured = {tag: v for tag, v in record.values.items() if tag.startswith(MEASURED_TAGS)}
        values = {tag: v for tag, v in record.values.items() if tag not in measured}
        lines = {"values": _line(record.step, values), "measured": _line(record.step, measured)}
        for name, line in lines.items():
            if line:
                with self.tolerated(str(self._files[name].path)):
                    self._files[name].file.append(line)

    def close_destination(self, _: Trainer) -> None:
        """Write the lines that wait and the digests, and close the files."""
        self._close_files()
        if self._has_started:
            self._write_digests()

    def _close_files(self) -> None:
        for file in self._files.values():
            with self.tolerated(str(file.path)):
                file.file.close()


def _line(step: int, values: Mapping[str, float]) -> bytes:
    """Return a record as a line; empty if it has no values."""
    if not values:
        return b""
    if "step" in values:
        raise ValueError(
            "a tag must not be 'step', the key of the iteration in each line. Rename the metric."
        )
    sorted_values = {tag: json_number(values[tag]) for tag in sorted(values)}
    return ENCODER.encode({"step": step, **sorted_values}).encode() + b"\n"
