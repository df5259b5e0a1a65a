"""The promise: killed anywhere, started again, the run ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HANG = 120.0
"""Seconds after which a process that should have ended counts as hanging."""


def start(folder: Path, ranks: int) -> list[subprocess.Popen[bytes]]:
    """Start the training on so many ranks, each a process group of its own with its workers."""
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
        ]
        with (folder / f"errors-{rank}").open("ab") as errors:
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **ranked, "OMP_NUM_THREADS": "1"},
                    stderr=errors,
                    start_new_session=True,
                )
            )
    return processes


def kill(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill every process with its workers, as a machine that loses its power would."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(folder: Path, ranks: int) -> tuple[str, bytes]:
    """Let the training run to its end; return what it made."""
    processes = start(folder, ranks)
    codes = [process.wait(timeout=HANG) for process in processes]
    assert codes == [0] * ranks, (folder / "errors-0").read_text()[-3000:]
    return (folder / "digest").read_text(), (folder / "metrics.jsonl").read_bytes()


def saves(folder: Path) -> int:
    """Return a number that changes with every file written: a clock that knows the machine."""
    checkpoints = folder / "checkpoints"
    return (
        sum(path.stat().st_mtime_ns for path in checkpoints.glob("*"))
        if checkpoints.is_dir()
        else 0
    )


def kill_at_random(folder: Path, ranks: int, draw: random.Random) -> bool:
    """Start the training and kill it just after a first sign of life; say whether it still ran."""
    processes = start(folder, ranks)
    before, deadline = saves(folder), time.monotonic() + HANG
    moment = draw.random()
    while saves(folder) == before and processes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.3 * moment**2)
    alive = all(process.poll() is None for process in processes)
    kill(processes)
    return alive


def check(tmp_path: Path, ranks: int, kills: int) -> None:
    expected = finish(tmp_path / "whole", ranks)
    draw = random.Random(ranks)
    killed = 0
    for attempt in range(3 * kills):
        folder = tmp_path / f"killed-{attempt}"
        while killed < kills and kill_at_random(folder, ranks, draw):
            killed += 1
        assert finish(folder, ranks) == expected
        if killed >= kills:
            return
    raise AssertionError(f"only {killed} of {kills} kills met a running process")


def test_a_run_killed_a_few_times_ends_like_the_one_nobody_touched(tmp_path):
    check(tmp_path, ranks=1, kills=3)


def test_a_run_killed_on_two_ranks_ends_like_the_one_nobody_touched(tmp_path):
    check(tmp_path, ranks=2, kills=1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_thirty_times_ends_like_the_one_nobody_touched(tmp_path, ranks):
    check(tmp_path, ranks=ranks, kills=30)
