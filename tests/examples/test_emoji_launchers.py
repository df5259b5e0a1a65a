"""The emoji example under every launcher, without a change: torchrun, Slurm, and Ignite's own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "2",
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_JOB_NUM_NODES": "1",
}
LAUNCHERS = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM",
    "TORCHELASTIC",
)
"""What the variables begin with that launchers set."""


def free_port() -> str:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def few_emoji(folder: Path, *first: str) -> list[str]:
    """Return the command of the example's script, on the few emoji that a test has time for."""
    flags = ("--epochs", "1", "--batch-size", "32", "--run-dir", str(folder / "run"))
    return [str(ROOT / "tests" / "examples" / "few_emoji.py"), *first, *flags]


def check_run(folder: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Check that all ended well, as one run of two ranks whose results come from one of them."""
    texts = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), texts
    assert "".join(text for text, _ in texts).count("unseen emoji, image to text") == 1
    settings = json.loads((folder / "run" / "settings.json").read_text())
    assert settings["trainer"]["ranks"] == 2
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    values = [line for line in lines if "train/loss" in line]
    assert len(values) == len(set(values)) > 0


def test_torchrun_needs_no_change_to_the_script(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}")
    check_run(tmp_path, [start(*torchrun, *few_emoji(tmp_path))])


@pytest.mark.slow
def test_torchrun_inside_a_slurm_job_counts_its_own_ranks(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}")
    one_task = {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    check_run(tmp_path, [start(*torchrun, *few_emoji(tmp_path), **one_task)])


def test_slurm_needs_no_change_to_the_script(tmp_path):
    job = {**SLURM, "SLURM_JOB_ID": free_port()}  # from whose last digits the ranks take the port
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    check_run(tmp_path, [start(*few_emoji(tmp_path), **job, **rank) for rank in ranks])


@pytest.mark.slow
def test_ignites_launcher_needs_no_change_to_the_script(tmp_path):
    check_run(tmp_path, [start(*few_emoji(tmp_path, "parallel", free_port()))])


LONELY = """
from datetime import timedelta

from diptych.engine import process_group

with process_group(backend="gloo", timeout=timedelta(seconds=2)):
    print("joined")
"""


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_lone_process_of_an_interactive_slurm_job_says_whom_it_waited_for(rank):
    job = {**SLURM, "SLURM_JOB_ID": free_port(), "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
    process = start("-c", LONELY, **job)
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, printed) == (1, "")
    last = errors.rstrip().splitlines()[-1]
    assert "LostRankError" in last
    assert "for all 2 ranks of the job to meet" in last
    assert f"SLURM_NTASKS=2, SLURM_PROCID={rank}" in last
    assert last.endswith("unset SLURM_PROCID.")
