"""Replaying what a guard caught, alone and on ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diptych.engine import Trainer
from diptych.engine.errors import CheckpointError
from diptych.handlers import CheckpointManager, LossGuard
from diptych.handlers.loss_guard.replay import replay
from tests.handlers.guarded import BAD, batches, caught, factory, make_trainer, other_factory
from tests.losses.ranks import Ranks


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
