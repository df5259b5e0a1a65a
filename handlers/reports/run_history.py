"""The settings and curves of a run, read from its directory into a bounded number of points."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from diptych.engine.state.run_identity import RunIdentity
from diptych.handlers.output.records import RecordReader, check_lines, read_identity
from diptych.handlers.output.sealed_json import read_sealed
from diptych.handlers.reports.curves import StepAndValue, extremes
from diptych.handlers.run_directory import RunDirectory

MOST_BUCKETS = 512
"""Buckets of a curve, an even number; each keeps at most three points."""
CROWDED = 12  # points of a bucket before all but its extremes are dropped


@attrs.frozen
class RunHistory:
    """The settings and curves of a run, read from its directory.

    Attributes:
        name: of the run.
        settings: dotted name to value, from `settings.json`; empty if there is none.
        curves: tag to steps and values. Of a long curve, neighbouring points share a bucket, of
            which the lowest, the highest and the last point are kept.
        identity: what decides the run's result, from `identity.json`; None if there is no such
            file.
        starts: when the run was started and resumed, and what had changed, from `settings.json`.
    """

    name: str
    settings: dict[str, Any]
    curves: dict[str, list[StepAndValue]]
    identity: RunIdentity | None = None
    starts: Sequence[Mapping[str, Any]] = ()


class BoundedCurve:
    """The points of a curve, of which a bounded number is kept: extremes, gaps and the last one.

    Consecutive points share a bucket. If there are too many buckets, neighbours are joined. The
    result depends on the points alone, not on when they were added.
    """

    def __init__(self) -> None:
        self._buckets: list[list[StepAndValue]] = []
        self._count, self._per_bucket = 0, 1
        self._last: StepAndValue | None = None

    def add(self, point: StepAndValue) -> None:
        """Add a point after the others."""
        if self._count == len(self._buckets) * self._per_bucket:
            if len(self._buckets) == MOST_BUCKETS:
                pairs = zip(self._buckets[::2], self._buckets[1::2], strict=True)
                self._buckets = [extremes(one + other) for one, other in pairs]
                self._per_bucket *= 2
            self._buckets.append([])
        bucket = self._buckets[-1]
        bucket.append(point)
        if len(bucket) == CROWDED:
            bucket[:] = extremes(bucket)
        self._count += 1
        self._last = point

    @property
    def points(self) -> list[StepAndValue]:
        """The points that are kept, in order."""
        points = [point for bucket in self._buckets for point in extremes(bucket)]
        if self._last is not None and points[-1] is not self._last:
            points.append(self._last)
        return points


class RunReader:
    """Reads the curves of a run from its directory; a second call reads what was added."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self.reset()

    def reset(self) -> None:
        """Forget what was read, to read everything again."""
        files = (self._directory.metrics, self._directory.measured)
        self._readers = [RecordReader(file) for file in files]
        self._curves: dict[str, BoundedCurve] = {}

    def read(self) -> RunHistory:
        """Return the run as it is now.

        Raises:
            OSError: naming the file, if one cannot be read.
            ValueError: naming the file, and the line of a record, if a file is damaged.
        """
        if any(reader.is_behind for reader in self._readers):
            self.reset()
        for reader in self._readers:
            if reader.path.is_file():
                for record in reader.new_records():
                    for tag, value in record.values.items():
                        self._curves.setdefault(tag, BoundedCurve()).add((record.step, value))
        curves = {tag: curve.points for tag, curve in self._curves.items()}
        settings, starts = read_settings(self._directory.settings)
        identity = read_identity(self._directory.identity)
        return RunHistory(self._directory.name, settings, curves, identity, starts)


def read_run(directory: str | os.PathLike[str]) -> RunHistory:
    """Read a run from its directory.

    Raises:
        FileNotFoundError: if the directory holds no metrics.jsonl.
        OSError: naming the file, if one cannot be read.
        ValueError: naming the file, and the line of a record, if a file is damaged.
    """
    run = RunDirectory(directory)
    if not run.metrics.is_file():
        raise FileNotFoundError(
            f"the run directory {directory} must hold {run.metrics.name}, got none. Pass the "
            "directory of one run, such as runs/emoji/2026-01-31_09-30-00Z."
        )
    for path in (run.metrics, run.measured):
        check_lines(path)
    return RunReader(run).read()


def read_settings(path: Path) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """Return the settings in `settings.json`, flat, and the run's starts; empty without the file.

    Raises:
        OSError: naming the file, if it cannot be read.
        ValueError: naming the file, if it is damaged.
    """
    try:
        settings = read_sealed(path, without="the run is then shown without its settings")
        starts = [start for start in settings.pop("starts", ()) if isinstance(start, Mapping)]
        return _flat(settings), starts
    except FileNotFoundError:
        return {}, []
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{path} must hold the settings of a run: {error}. Remove it.") from error


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        items = _named_items(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _named_items(values: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return the items of a list with names: an object's class, which is the same in any order."""
    items: dict[str, Any] = {}
    for number, value in enumerate(values):
        known = value if isinstance(value, Mapping) and "class" in value else {}
        name = str(known.get("class", number)).rpartition(".")[2]
        name = ".".join([name, *([known["prefix"]] if known.get("prefix") else [])])
        items[f"{name}.{number}" if name in items else name] = value
    return list(items.items())
