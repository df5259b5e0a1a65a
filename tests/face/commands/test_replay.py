"""`diptych replay`: repeating what a guard recorded, from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.__main__ import main
from diptych.handlers import LossGuard
from tests.handlers.guarded import BAD, batches, caught, make_trainer

ROOT = Path(__file__).resolve().parents[3]
FACTORY = "tests.handlers.guarded:factory"


def test_the_command_replays_and_says_what_it_found(tmp_path):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "diptych", "replay"]
    done = subprocess.run(
        [*command, str(caught(tmp_path)), "--factory", FACTORY],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"iteration {BAD}, epoch 1, rank 0" in done.stdout
    assert "samples: 40, 41, 42, 43, 44, 45" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith("terms/near"))
    assert row.split() == ["terms/near", "nan", "nan"]
    assert done.stdout.endswith("0 values differ\n")


def test_the_command_ends_with_one_where_values_differ(tmp_path, capsys):
    path = str(caught(tmp_path, "spike"))
    arguments = ["replay", path, "--factory", "tests.handlers.guarded:other_factory"]
    assert main(arguments) == 1
    assert "terms/near" in capsys.readouterr().out
    assert main([*arguments, "--tolerance", "0.9"]) == 0


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("tests.handlers.guarded", "factory must be module:function"),
        ("no_such_module:factory", "No module named 'no_such_module'"),
        ("builtins:list", "factory must return a Trainer, or a tuple that begins with one"),
    ],
)
def test_an_unusable_factory_is_exit_code_two(tmp_path, capsys, factory, message):
    assert main(["replay", str(caught(tmp_path)), "--factory", factory]) == 2
    assert message in capsys.readouterr().err


def test_a_record_that_does_not_exist_is_an_error_that_says_so(tmp_path, capsys):
    assert main(["replay", str(tmp_path / "none.pt"), "--factory", FACTORY]) == 2
    assert "does not exist" in capsys.readouterr().err


def catch_on_two_ranks(folder: str) -> None:
    """Record a batch that is bad on one rank, as its script does."""
    trainer = make_trainer().attach(LossGuard(folder))
    trainer.run(batches("nan"), max_epochs=1)


def test_ranks_replay_under_torchrun(ranks, tmp_path):
    ranks.run(catch_on_two_ranks, [(str(tmp_path),)] * 2)
    record = tmp_path / f"iteration_0000000{BAD}_rank_0.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [
            *launcher,
            "--nproc-per-node",
            "2",
            "-m",
            "diptych",
            "replay",
            record,
            "--factory",
            FACTORY,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"iteration {BAD}, epoch 1, rank {rank}" in done.stdout


def test_a_path_that_no_file_can_have_is_an_error_without_a_traceback(capsys):
    assert main(["replay", "x" * 400, "--factory", "math:sqrt"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diptych replay: error: ")
    assert "x" * 400 in error
