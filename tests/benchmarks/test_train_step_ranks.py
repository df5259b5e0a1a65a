"""The benchmark of several ranks runs on a CPU, at tiny sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_all_tables_are_printed_on_two_cpu_ranks():
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    sizes = ["--samples", "4", "--steps", "1", "--large", "16", "--sharded", "4"]
    script = str(ROOT / "benchmarks" / "train_step_ranks.py")
    done = subprocess.run([*ranks, script, *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in (
        "| 4 | eager | DistributedDataParallel |",
        "10 updates with 8 samples: the losses of one rank and of 2 differ by",
        "batch 16 in pieces of 8:",
        "| fully_shard | 4 |",
        "| diptych, shard=True | 4 |",
    ):
        assert words in done.stdout
