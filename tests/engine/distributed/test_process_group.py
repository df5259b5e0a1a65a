"""Ranks meet at each start of a job, and the error of one that cannot names the cause."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from diptych.engine import LostRankError, process_group
from diptych.engine.distributed import process_group as module
from diptych.engine.distributed.meeting import meet
from tests.engine.failing_job import free_port

ROOT = Path(__file__).parents[3]
SCRIPT = """
import json, os, signal, sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from diptych.engine import process_group

start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with process_group(backend="gloo", timeout=timedelta(seconds=30)):
    total = torch.ones(1)
    dist.all_reduce(total)
    if start == 0 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(total)
    Path(sys.argv[1], f"{start}-{dist.get_rank()}.json").write_text(json.dumps(float(total)))
"""


def meeting(store: dist.Store, *present: int, ranks: int = 3, seconds: float = 10.0) -> list[Any]:
    """Return the prefix or the error of each rank that is present, each in a thread."""
    found: dict[int, Any] = {}

    def come(rank: int) -> None:
        try:
            found[rank] = meet(store, rank, ranks, timedelta(seconds=seconds))
        except LostRankError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in present]


def test_ranks_that_meet_share_a_prefix_that_the_next_start_does_not_use():
    store = dist.HashStore()
    first, second = (set(meeting(store, 2, 0, 1)) for _ in range(2))
    assert len(first) == len(second) == 1
    assert first != second


def test_what_an_ended_process_left_in_the_store_does_not_count_as_its_rank():
    store = dist.HashStore()
    meeting(store, 0, 1, 2)
    zeroth, first = meeting(store, 0, 1, seconds=0.5)
    assert zeroth == "rank 2 did not come"
    assert first.startswith("diptych/")  # its process group then waits for rank 2 in vain


def test_a_rank_that_comes_late_is_waited_for():
    store, found = dist.HashStore(), []
    timer = threading.Timer(0.3, lambda: found.extend(meeting(store, 1, 2)))
    timer.start()
    found += meeting(store, 0)
    timer.join()
    assert len(found) == 3
    assert len(set(found)) == 1


def test_without_the_first_rank_nobody_meets():
    (error,) = meeting(dist.HashStore(), 1, ranks=2, seconds=0.2)
    assert error.startswith("rank 0 did not come")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a process is not ended by signals there")
def test_ranks_that_torchrun_restarts_after_one_was_killed_meet_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
    command = [sys.executable, *torchrun, f"--master-port={free_port()}", str(script), tmp_path]
    job = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert job.returncode == 0, job.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert found == {"1-0": 4.0, "1-1": 4.0}  # nothing from the first start


class Backend:
    """Fails to connect a number of times, as gloo does, then is there."""

    def __init__(self, failures: int, message: str = "Gloo connectFullMesh failed with") -> None:
        self.failures, self.message, self.attempts = failures, message, 0

    def __call__(self, *_: Any, **__: Any) -> None:
        os.environ["RANK"] = "changed"
        self.attempts += 1
        if self.attempts <= self.failures:
            raise RuntimeError(f"{self.message} [gloo/transport/tcp]")


def joined(backend: Backend, monkeypatch: pytest.MonkeyPatch, seconds: float = 20.0) -> None:
    """Join a job of two ranks whose backend is replaced."""
    monkeypatch.setattr(module.idist, "initialize", backend)
    monkeypatch.setattr(module.idist, "finalize", lambda: None)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with process_group(backend="gloo", timeout=timedelta(seconds=seconds)):
        pass


def test_ranks_that_could_not_connect_meet_again(monkeypatch, caplog):
    backend = Backend(failures=2)
    joined(backend, monkeypatch)
    assert backend.attempts == 3
    assert caplog.text.count("The ranks met and could not connect; they meet again.") == 2


def test_the_error_of_ranks_that_met_and_never_connected_names_the_connection(monkeypatch):
    with pytest.raises(LostRankError) as caught:
        joined(Backend(failures=10**9), monkeypatch, seconds=0.01)
    assert "rank 1 waited 0.0 s for all 2 ranks of the job to connect" in str(caught.value)
    assert "They had met, and the connection between them failed: Gloo connect" in str(caught.value)
    assert os.environ["RANK"] == "1"


def test_a_failure_that_another_attempt_cannot_mend_is_raised_at_once(monkeypatch):
    backend = Backend(failures=1, message="Unable to find an interface for: eth9")
    with pytest.raises(LostRankError, match="Unable to find an interface"):
        joined(backend, monkeypatch)
    assert backend.attempts == 1


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        *(("WORLD_SIZE", "abc", 1), ("WORLD_SIZE", "0", 1), ("RANK", "-1", 0)),
        *(("SLURM_NTASKS", "", 1), ("MASTER_PORT", "x", 1), ("MASTER_PORT", "0", 1)),
    ],
)
def test_a_variable_of_the_launcher_that_is_no_number_is_named(monkeypatch, name, value, least):
    monkeypatch.setenv(name, value)
    expected = f"{name} must be a whole number >= {least}, got '{value}'"
    with pytest.raises(ValueError, match=expected), process_group():
        pass


def test_a_rank_beyond_the_number_of_ranks_is_named_and_nobody_waits(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK must be less than WORLD_SIZE, which is 2, got 2"):
        process_group().__enter__()
