"""A run that is killed anywhere and started again ends like the uninterrupted run."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch

from tests.interruption.processes import HANG, finish, kill, saves, start


def kill_at_random(
    folder: Path, ranks: int, draw: random.Random, environment: dict[str, str]
) -> bool:
    """Start the training, kill it after its first save; return whether it was still running."""
    processes = start(folder, ranks, **environment)
    before, deadline = saves(folder), time.monotonic() + HANG
    moment = draw.random()
    while saves(folder) == before and processes[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.3 * moment**2)
    alive = all(process.poll() is None for process in processes)
    kill(processes)
    return alive


def check(tmp_path: Path, ranks: int, kills: int, **environment: str) -> None:
    expected = finish(tmp_path / "whole", ranks, **environment)
    draw = random.Random(ranks)
    killed = 0
    for attempt in range(3 * kills):
        folder = tmp_path / f"killed-{attempt}"
        while killed < kills and kill_at_random(folder, ranks, draw, environment):
            killed += 1
        assert finish(folder, ranks, **environment) == expected
        if killed >= kills:
            return
    raise AssertionError(f"only {killed} of {kills} kills met a running process")


def test_a_run_killed_a_few_times_ends_like_the_uninterrupted_run(tmp_path):
    check(tmp_path, ranks=1, kills=2)


def test_a_run_killed_on_two_ranks_ends_like_the_uninterrupted_run(tmp_path):
    check(tmp_path, ranks=2, kills=1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_thirty_times_ends_like_the_uninterrupted_run(tmp_path, ranks):
    check(tmp_path, ranks=ranks, kills=30)


@pytest.mark.slow
def test_a_run_with_a_sharded_model_ends_like_the_uninterrupted_run(tmp_path):
    check(tmp_path, ranks=2, kills=10, SHARD="1")


def kill_inside_an_epoch(folder: Path, ranks: int, **environment: str) -> None:
    """Start the training and kill all ranks once there is a checkpoint from inside an epoch."""
    processes = start(folder, ranks, **environment)
    while not list((folder / "checkpoints").glob("*_iteration_*.pt")):
        time.sleep(0.01)
        assert all(process.poll() is None for process in processes)
    kill(processes)


@pytest.mark.parametrize(("before", "after"), [pytest.param(2, 1, marks=pytest.mark.slow), (1, 2)])
def test_another_number_of_ranks_and_another_micro_batch_continue_with_the_same_order(
    tmp_path, before, after
):
    finish(tmp_path / "whole", 1)
    expected = json.loads((tmp_path / "whole" / "order.json").read_text())
    folder = tmp_path / "killed"
    kill_inside_an_epoch(folder, before)
    finish(folder, after, MICROBATCH_SIZE="5")
    assert json.loads((folder / "order.json").read_text()) == expected


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_another_number_of_ranks_ends_with_the_weights_of_the_uninterrupted_run(
    tmp_path, before, after
):
    finish(tmp_path / "whole", 1, EQUAL="1")
    folder = tmp_path / "killed"
    kill_inside_an_epoch(folder, before, EQUAL="1")
    finish(folder, after, EQUAL="1")
    orders = [(run / "order.json").read_text() for run in (tmp_path / "whole", folder)]
    assert orders[0] == orders[1]
    whole, killed = (torch.load(run / "weights.pt") for run in (tmp_path / "whole", folder))
    assert len(whole) == len(killed) > 6
    for expected, found in zip(whole, killed, strict=True):
        difference = (found.double() - expected.double()).norm()
        assert difference <= 1e-9 * expected.double().norm()
