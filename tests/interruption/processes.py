"""Processes that train on one rank or several, to be killed or to finish."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANG = 120.0
"""Seconds after which a process that should have ended counts as hanging."""


def start(
    folder: Path, ranks: int, *, seconds: float = 0.0, **environment: str
) -> list[subprocess.Popen[bytes]]:
    """Start the training; each rank and its workers are a process group of their own."""
    rendezvous = folder / f"rendezvous-{time.time_ns()}"
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(ranks):
        ranked = {"RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        command = [
            sys.executable,
            "-m",
            "tests.interruption.training",
            str(folder),
            str(rendezvous),
            *([str(seconds)] if seconds else []),
        ]
        with (folder / f"errors-{rank}").open("ab") as errors:
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **ranked, **environment, "OMP_NUM_THREADS": "1"},
                    stderr=errors,
                    start_new_session=True,
                )
            )
    return processes


def kill(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill every process with its workers, as a power failure does."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(folder: Path, ranks: int, **environment: str) -> tuple[str, bytes]:
    """Run the training to its end; return its digest and metrics."""
    processes = start(folder, ranks, **environment)
    errors = [folder / f"errors-{rank}" for rank in range(ranks)]
    assert codes(processes) == [0] * ranks, "\n".join(x.read_text()[-3000:] for x in errors)
    return (folder / "digest").read_text(), (folder / "metrics.jsonl").read_bytes()


def codes(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for processes to end; return their exit codes."""
    return [process.wait(timeout=HANG) for process in processes]


def saves(folder: Path) -> int:
    """Return a number that changes with every file written: a clock of the training's progress."""
    checkpoints = folder / "checkpoints"
    return sum(_written(path) for path in checkpoints.glob("*")) if checkpoints.is_dir() else 0


def wait_for_a_save(folder: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until there is a checkpoint, while the processes train."""
    while not saves(folder):
        time.sleep(0.01)
        assert all(process.poll() is None for process in processes)


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # it has got its name, or gone, meanwhile
        return 0
