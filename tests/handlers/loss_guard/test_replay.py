"""Replaying what a guard caught: from Python, from the command line, on ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diptych.engine import Trainer
from diptych.engine.errors import CheckpointError
from diptych.handlers import CheckpointManager
from diptych.handlers.loss_guard.replay import LossGuard, find_factory, main, replay
from tests.handlers.guarded import BAD, batches, factory, make_trainer, other_factory
from tests.losses.ranks import Ranks

ROOT = Path(__file__).resolve().parents[3]
FACTORY = "tests.handlers.guarded:factory"


def caught(folder: Path, fault: str = "nan", **settings: object) -> Path:
    """Return the record of a run whose batch went wrong after some training, with dropout."""
    trainer = make_trainer(**settings).attach(LossGuard(folder / "caught", window=3))
    trainer.run(batches(fault), max_epochs=1)
    [path] = (folder / "caught").iterdir()
    return path


@pytest.mark.parametrize("fault", ["nan", "spike"])
@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_a_replay_gives_every_term_and_norm_again_to_the_bit(tmp_path, fault, microbatch_size):
    path = caught(tmp_path, fault, microbatch_size=microbatch_size)
    replayed = replay(path, lambda: make_trainer(microbatch_size=microbatch_size))
    assert replayed.differing(tolerance=0.0) == []
    assert {"terms/near", "terms/size", "norms/total"} <= set(replayed.reproduced)
    assert replayed.settings == {}


def test_a_replay_transforms_the_batch_as_it_was(tmp_path):
    def noisy(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**batch, "image": batch["image"] * torch.rand(1)}

    replayed = replay(
        caught(tmp_path, "spike", transform=noisy), lambda: make_trainer(transform=noisy)
    )
    assert replayed.differing(tolerance=0.0) == []


def test_a_replay_of_another_loss_differs_and_names_where(tmp_path):
    replayed = replay(caught(tmp_path, "spike"), other_factory)
    assert {"terms/near", "terms/size", "norms/total"} <= set(replayed.differing())


def test_a_replay_names_settings_that_differ(tmp_path):
    replayed = replay(caught(tmp_path), lambda: make_trainer(microbatch_size=2))
    assert replayed.settings == {"microbatch_size": (None, 2)}


def test_what_the_factory_attaches_takes_no_part(tmp_path):
    path = caught(tmp_path)

    def attached() -> Trainer:
        guard = LossGuard(tmp_path / "again", policy="raise")
        return make_trainer().attach(guard, CheckpointManager(tmp_path / "checkpoints", every=1))

    assert replay(path, attached).differing(0.0) == []
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_a_replay_leaves_random_generators_alone(tmp_path):
    path = caught(tmp_path)
    before = torch.get_rng_state()
    replay(path, factory)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_record_of_another_model_is_refused(tmp_path):
    def other() -> Trainer:
        trainer = make_trainer()
        trainer.model.text = torch.nn.Linear(5, 7)
        return trainer

    with pytest.raises(CheckpointError, match="record is of another model"):
        replay(caught(tmp_path), other)


def test_a_factory_that_returns_no_trainer_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"factory must return a Trainer.*got list"):
        replay(caught(tmp_path), list)


def test_the_command_replays_and_says_what_it_found(tmp_path):
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        "-m",
        "diptych.handlers.loss_guard.replay",
    ]
    done = subprocess.run(
        [*command, "replay", str(caught(tmp_path)), "--factory", FACTORY],
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
    ("named", "message"),
    [
        ("tests.handlers.guarded", "must be given as module:function, got"),
        ("no_such_module:factory", "'no_such_module': No module named 'no_such_module'"),
        ("tests.handlers.guarded:nothing", "must have a function 'nothing', got None"),
    ],
)
def test_a_factory_that_cannot_be_found_is_an_error_that_says_so(tmp_path, capsys, named, message):
    assert main(["replay", str(caught(tmp_path)), "--factory", named]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"factory|function"):
        find_factory(named)


def test_a_record_that_does_not_exist_is_an_error_that_says_so(tmp_path, capsys):
    assert main(["replay", str(tmp_path / "none.pt"), "--factory", FACTORY]) == 2
    assert "does not exist" in capsys.readouterr().err


def replayed_on_a_rank(folder: str) -> tuple[list[str], int]:
    """Catch a batch that is bad on the second rank alone, and replay it on both."""
    trainer = make_trainer().attach(LossGuard(folder))
    trainer.run(batches("nan" if dist.get_rank() else None), max_epochs=1)
    dist.barrier()
    path = Path(folder) / f"iteration_0000000{BAD}_rank_0.pt"
    replayed = replay(path, factory)
    return replayed.differing(0.0), replayed.record["rank"]


def test_ranks_replay_each_its_own_part(ranks: Ranks, tmp_path):
    assert ranks.run(replayed_on_a_rank, [(str(tmp_path),)] * 2) == [([], 0), ([], 1)]
    with pytest.raises(CheckpointError, match="is of 2 ranks, got 1: replay it with torchrun"):
        replay(tmp_path / f"iteration_0000000{BAD}_rank_1.pt", factory)
