"""The directory of a run: its path and the names of the files in it."""

from __future__ import annotations

import logging
import os
import re
from datetime import datetime, timezone
from pathlib import Path

import attrs

from diptych.engine.distributed.agreement import on_rank_zero
from diptych.handlers.contained_paths import fitting_name

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
WEIGHTS = "model.safetensors"
"""The exported weights, beside the checkpoints."""
RUN = re.compile(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\dZ)(-\d{3})?", re.ASCII)
"""The names that `new_run` gives: a time, and a number if there is a run of that time already."""


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path, which a later change of the working directory leaves alone."""
    return Path(path).absolute()


@attrs.frozen
class RunDirectory(os.PathLike[str]):
    """A run's directory, `runs/<name>/<timestamp>/`, and the files in it.

    ```python
    run = RunDirectory("runs/emoji/2026-01-31_09-30-00Z")
    read_records(run.metrics)
    ```

    It is a path: `open`, `Path` and every handler with a `directory` take it. Neither the directory
    nor a file in it has to exist.

    Args:
        path: of the directory; relative to the working directory of this moment.
    """

    path: Path = attrs.field(converter=absolute)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        """The name of the run: the last two parts of the path."""
        return "/".join(self.path.resolve().parts[-2:])

    @property
    def checkpoints(self) -> Path:
        """The directory of the checkpoints, written by `CheckpointManager`."""
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """The exported weights, written by `CheckpointManager(export=True)`."""
        return self.checkpoints / WEIGHTS

    @property
    def metrics(self) -> Path:
        """The records, written by `JsonLines`."""
        return self.path / METRICS

    @property
    def measured(self) -> Path:
        """The values that depend on the machine, written by `JsonLines`."""
        return measured_file(self.metrics)

    @property
    def settings(self) -> Path:
        """The settings and versions, written by `RunRecord`."""
        return self.path / "settings.json"

    @property
    def identity(self) -> Path:
        """What decides the run's result, written by `RunRecord`."""
        return self.path / "identity.json"

    @property
    def report(self) -> Path:
        """The page of curves, written by `HistoryPlots`."""
        return self.path / "report.html"

    @property
    def curves(self) -> Path:
        """The picture of the curves, written by `HistoryPlots(png=True)`."""
        return self.path / "curves.png"

    @property
    def caught(self) -> Path:
        """The directory of the caught batches, for `LossGuard`."""
        return self.path / "caught"


def metrics_file(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a file of records, given it or the run's directory."""
    path = absolute(path)
    return path if path.suffix == ".jsonl" else path / METRICS


def measured_file(metrics: Path) -> Path:
    """Return the file of measured values that belongs to a file of records."""
    return metrics.with_name(fitting_name(metrics.stem, ".measured.jsonl"))


def new_run(root: str | os.PathLike[str], name: str) -> Path:
    """Make the directory of a new run, `root/name/2026-01-31_09-30-00Z`, and return its path.

    The time is in UTC. A second run of the same second gets a number. If the clock has gone back,
    the run gets the time of the latest one and a number, so that it is the latest now. Over several
    ranks, call it after the process group is initialized; all ranks get the same directory.

    Raises:
        ValueError: if the name is not the name of one directory.
    """
    parent = _parent(root, name)
    return on_rank_zero(lambda: _make(parent))


def latest_run(root: str | os.PathLike[str], name: str) -> Path | None:
    """Return the directory of the latest run that `new_run` made; None if there is none.

    Raises:
        ValueError: if the name is not the name of one directory.
    """
    parent = _parent(root, name)
    return on_rank_zero(lambda: _latest(parent))


def _parent(root: str | os.PathLike[str], name: str) -> Path:
    if name in {"", ".", ".."} or Path(name).name != name:
        raise ValueError(f"name must be the name of one directory, got {name!r}")
    return Path(root) / name


def _latest(parent: Path) -> Path | None:
    runs = (path for path in parent.glob("*Z*") if RUN.fullmatch(path.name) and path.is_dir())
    return max(runs, default=None)


def _make(parent: Path) -> Path:
    stamp, latest = datetime.now(timezone.utc).strftime("%Y-%m-%d_%H-%M-%SZ"), _latest(parent)
    if latest is not None and latest.name[: len(stamp)] > stamp:
        logger.warning("The clock has gone back: it is %s, and there is %s.", stamp, latest)
        stamp = latest.name[: len(stamp)]
    number = 1
    while True:
        # Zero-padded, so that the order of the names is the order of time.
        path = parent / (stamp if number == 1 else f"{stamp}-{number:03}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path
