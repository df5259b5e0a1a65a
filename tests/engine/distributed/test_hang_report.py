"""A rank that waits in vain raises the place, the time, and what became of the others."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.engine import LostRankError
from diptych.engine.distributed.hang_monitor import hangs_logged
from diptych.engine.distributed.hang_report import (
    current_place,
    raise_if_lost,
    waits_at,
)
from tests.engine import alone, lost_ranks
from tests.engine.failing_job import free_port
from tests.engine.models import paired, trainer_of

pytestmark = pytest.mark.xdist_group("hang_report")  # its processes start once, on one worker

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the errors of two processes in each case."""
    folder = tmp_path_factory.mktemp("lost")
    torch.multiprocessing.spawn(lost_ranks.work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone_errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the errors of two processes of which one does something alone."""
    folder = tmp_path_factory.mktemp("alone")
    torch.multiprocessing.spawn(alone.work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", lost_ranks.CASES)
def test_a_rank_that_waits_in_vain_names_itself_the_place_the_time_and_the_other(errors, name: str):
    comes, _, place = lost_ranks.CASES[name]
    found = errors[comes][name]
    assert f"rank {comes} waited" in found["text"]
    assert f"for the other ranks, at: {place}" in found["text"]
    assert f"Rank {1 - comes} did not reach this collective: it hangs" in found["text"]
    seconds = float(re.search(r"waited (\S+) s", found["text"])[1])
    # Gradients are sent before they are waited for: on a slow machine most of the timeout is over.
    least = 0.0 if name == "gradients" else lost_ranks.TIMEOUT
    assert least <= seconds <= found["seconds"] + 0.1
    assert "The above exception was the direct cause" in found["trace"]  # the error of the backend


@pytest.mark.slow
@pytest.mark.parametrize("name", alone.BOTH_END)
def test_what_only_one_rank_does_ends_with_a_sentence_on_both(alone_errors, name: str):
    _, parts = alone.BOTH_END[name]
    for rank, part in enumerate(parts):
        assert part in alone_errors[rank][name]["text"]


def test_ranks_that_wait_in_two_places_name_each_other(errors):
    first, second = (rank["both"]["text"] for rank in errors)
    assert first.endswith("at: a log point. Rank 1 waits at: a place beside")
    assert second.endswith("at: a place beside. Rank 0 waits at: a log point")


def test_a_rank_that_has_failed_is_named_with_its_error_by_the_one_that_waits(errors):
    assert errors[0]["fails"]["text"].endswith(
        "at: a log point. Rank 1 failed with ValueError: planted (its own traceback says where)"
    )


def job(folder: Path, what: str, *more: str) -> list[tuple[int, str]]:
    """Return exit code and standard error of both ranks of a job that goes wrong."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.failing_job", str(folder), what, *more],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


def test_a_failing_rank_ends_the_job_with_its_own_traceback(tmp_path):
    (waiting_code, waited), (failing_code, failed) = job(tmp_path, "raises")
    assert (waiting_code, failing_code) == (1, 1)
    assert failed.rstrip().endswith("ValueError: planted")
    assert failed.count("Traceback") == 1
    assert "in goes_wrong" in failed
    last = waited.rstrip().splitlines()[-1]
    assert "LostRankError: rank 0 waited" in last
    assert last.endswith("Rank 1 failed with ValueError: planted (its own traceback says where)")


def test_a_rank_that_vanishes_is_missed_at_once(tmp_path):
    (code, text), (gone, _) = job(tmp_path, "leaves")
    assert (code, gone) == (1, 3)
    assert float(re.search(r"waited (\S+) s", text)[1]) < 30  # of a timeout of 60
    assert "Rank 1 did not reach this collective: it has ended, or ran another code path" in text


@pytest.mark.skipif(sys.platform == "win32", reason="a process is not ended by signals there")
def test_a_process_that_its_backend_ends_leaves_the_stack_of_the_thread_that_waits(tmp_path):
    (code, text), _ = job(tmp_path, "aborts")
    assert code == -6
    assert "Fatal Python error: Aborted" in text
    assert re.search(r'gradient_average.py", line \d+ in receive', text)


def test_an_error_that_is_no_collectives_is_left_alone():
    error = RuntimeError("shapes do not fit")
    raise_if_lost(error)

    @waits_at("the loss")
    def failing() -> None:
        raise error

    with pytest.raises(RuntimeError) as caught:
        failing()
    assert caught.value is error


def test_alone_nothing_is_renamed(monkeypatch):
    @waits_at("the loss")
    def failing() -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError) as caught:
        failing()
    assert not isinstance(caught.value, LostRankError)


def test_a_function_that_is_a_place_keeps_its_name_and_its_result():
    @waits_at("the loss")
    def double(value: int) -> int:
        """Twice."""
        return 2 * value

    assert (double(4), double.__name__, double.__doc__) == (8, "double", "Twice.")


def logged(caplog: pytest.LogCaptureFixture, act: Any, timeout: float = 0.2) -> list[str]:
    """Return what the monitor logs about this thread while it acts."""
    level = caplog.at_level(logging.WARNING, "diptych.engine.distributed.hang_monitor")
    with level, hangs_logged(timedelta(seconds=timeout)):
        act()
    return [record.getMessage() for record in caplog.records]


def test_a_thread_that_waits_for_most_of_a_timeout_is_logged_with_its_place_and_its_stack(caplog):
    @waits_at("averaging gradients")
    def waiting() -> None:
        time.sleep(0.5)

    (message,) = logged(caplog, waiting)
    assert re.match(r"Rank 0 has been at one place for 0\.\d s: averaging gradients\.", message)
    assert "in waiting" in message


def test_a_handler_in_which_a_thread_waits_is_named(caplog):
    trainer = trainer_of()
    trainer.add_event_handler("EPOCH_STARTED", lambda: time.sleep(0.5))
    (message,) = logged(caplog, lambda: trainer.run([paired(4)]))
    assert " s: <lambda>." in message


def test_a_thread_that_makes_progress_is_not_logged(caplog):
    trainer = trainer_of(log_every=1)
    trainer.add_event_handler("ITERATION_STARTED", lambda: time.sleep(0.02))
    assert logged(caplog, lambda: trainer.run([paired(4)] * 20), timeout=0.3) == []
    assert threading.active_count() == len(threading.enumerate())


def names() -> Any:
    """Return the innermost place of this thread."""
    place = current_place(threading.get_ident())
    return None if place is None else place[0]


def test_places_nest_and_a_failing_one_is_left_too():
    seen = []

    @waits_at("inner")
    def inner(*, fails: bool) -> None:
        seen.append(names())
        if fails:
            raise ValueError("planted")

    @waits_at("outer")
    def outer(*, fails: bool) -> None:
        inner(fails=fails)
        seen.append(names())

    outer(fails=False)
    with pytest.raises(ValueError, match="planted"):
        outer(fails=True)
    assert seen == ["inner", "outer", "inner"]
    assert names() is None


def test_a_handler_that_fails_leaves_its_place():
    trainer = trainer_of()

    def fail() -> None:
        raise ValueError("planted")

    trainer.add_event_handler("ITERATION_STARTED", fail)
    with pytest.raises(ValueError, match="planted"):
        trainer.run([paired(4)])
    assert names() is None


def test_the_monitor_names_the_innermost_place(caplog):
    @waits_at("a log point")
    def inner() -> None:
        time.sleep(0.5)

    @waits_at("an iteration")
    def outer() -> None:
        inner()

    (message,) = logged(caplog, outer)
    assert ": a log point." in message


def test_every_thread_has_places_of_its_own():
    found, entered, done = [], threading.Event(), threading.Event()

    @waits_at("elsewhere")
    def work() -> None:
        entered.set()
        done.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait(10)
    found.append(current_place(thread.ident)[0])
    assert names() is None
    done.set()
    thread.join()
    assert found == ["elsewhere"]
    assert current_place(thread.ident) is None
