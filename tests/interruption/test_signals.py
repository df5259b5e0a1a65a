"""Signals to processes with workers, on one rank and on two: they save, log it and end."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.interruption.processes import codes, finish, kill, start, wait_for_a_save


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """Return digest and metrics of the uninterrupted run."""
    return finish(tmp_path_factory.mktemp("whole"), 1)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGUSR1, 138),
        pytest.param(signal.SIGINT, -signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_process_and_its_workers_saves_and_gives_the_conventional_code(
    tmp_path, number, code, expected
):
    (process,) = start(tmp_path, 1, seconds=0.2)
    wait_for_a_save(tmp_path, [process])
    os.killpg(process.pid, number)
    assert codes([process]) == [code]
    told = (tmp_path / "errors-0").read_text()
    assert f"Signal {int(number)} ends the run here. It resumes from {tmp_path}" in told
    assert finish(tmp_path, 1) == expected


@pytest.mark.parametrize(
    "environment",
    [{}, pytest.param({"SHARD": "1"}, marks=pytest.mark.slow)],
    ids=["whole", "shared"],
)
def test_a_signal_to_one_of_two_ranks_ends_both_at_one_iteration_with_a_checkpoint(
    tmp_path, environment
):
    expected = finish(tmp_path / "whole", 2, **environment)
    folder = tmp_path / "asked"
    processes = start(folder, 2, seconds=0.2, **environment)
    wait_for_a_save(folder, processes)
    processes[1].send_signal(signal.SIGTERM)
    time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)  # a launcher that passes on what a scheduler sent
    assert codes(processes) == [143, 143]
    assert "Signal 15 ends the run here" in (folder / "errors-0").read_text()
    assert "Traceback" not in (folder / "errors-1").read_text()
    assert finish(folder, 2, **environment) == expected


def test_a_second_process_on_the_folder_is_refused(tmp_path):
    (first,) = start(tmp_path, 1, seconds=5.0)
    wait_for_a_save(tmp_path, [first])
    (second,) = start(tmp_path, 1)
    assert codes([second]) == [1]
    told = (tmp_path / "errors-0").read_text()
    assert f"must be used by one process, and process {first.pid} on" in told
    assert first.poll() is None
    kill([first])


def test_an_unwritable_folder_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way of the folder")
    processes = start(tmp_path, 2)
    # Not always 1: torch may abort a process whose peers have gone while it leaves.
    assert 0 not in codes(processes)
    for rank in range(2):
        assert "checkpoints cannot be written" in (tmp_path / f"errors-{rank}").read_text()
