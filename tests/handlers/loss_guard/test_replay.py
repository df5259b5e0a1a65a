"""replay: repeats a recorded update, in one process and on several ranks."""

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
def test_a_replay_reproduces_every_term_and_norm_bit_for_bit(tmp_path, fault, microbatch_size):
    path = caught(tmp_path, fault, microbatch_size=microbatch_size)
    replayed = replay(path, lambda: make_trainer(microbatch_size=microbatch_size))
    assert replayed.differing(tolerance=0.0) == []
    assert {"terms/near", "terms/size", "norms/total"} <= set(replayed.reproduced)
    assert replayed.settings == {}


def test_a_replay_repeats_the_random_transform(tmp_path):
    def noisy(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**batch, "image": batch["image"] * torch.rand(1)}

    replayed = replay(
        caught(tmp_path, "spike", transform=noisy), lambda: make_trainer(transform=noisy)
    )
    assert replayed.differing(tolerance=0.0) == []


def test_a_replay_with_another_loss_names_the_values_that_differ(tmp_path):
    replayed = replay(caught(tmp_path, "spike"), other_factory)
    assert {"terms/near", "terms/size", "norms/total"} <= set(replayed.differing())


def test_a_replay_names_the_settings_that_differ(tmp_path):
    replayed = replay(caught(tmp_path), lambda: make_trainer(microbatch_size=2))
    assert replayed.settings == {"microbatch_size": (None, 2)}


def test_handlers_of_the_factory_are_not_called(tmp_path):
    path = caught(tmp_path)

    def attached() -> Trainer:
        guard = LossGuard(tmp_path / "again", policy="raise")
        return make_trainer().attach(guard, CheckpointManager(tmp_path / "checkpoints", every=1))

    assert replay(path, attached).differing(0.0) == []
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_a_part_that_the_factory_puts_into_eval_mode_stays_in_it(tmp_path):
    def frozen() -> Trainer:
        trainer = make_trainer()
        trainer.model.image[1].eval()
        return trainer

    frozen_run = frozen().attach(LossGuard(tmp_path / "caught", window=3))
    frozen_run.run(batches("spike"), max_epochs=1)
    [path] = (tmp_path / "caught").iterdir()
    assert replay(path, frozen).differing(tolerance=0.0) == []


def test_a_replay_restores_the_random_generators(tmp_path):
    path = caught(tmp_path)
    before = torch.get_rng_state()
    replay(path, factory)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_record_of_another_model_is_refused(tmp_path):
    def other() -> Trainer:
        trainer = make_trainer()
        trainer.model.text = torch.nn.Linear(5, 7)
        parameters = [*trainer.model.parameters(), *trainer.loss.parameters()]
        return trainer.replica(optimizer=torch.optim.SGD(parameters, lr=0.1))

    with pytest.raises(CheckpointError, match="record is of another model"):
        replay(caught(tmp_path), other)


def test_a_factory_that_returns_no_trainer_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"factory must return a Trainer.*got list"):
        replay(caught(tmp_path), list)


def replayed_on_a_rank(folder: str) -> tuple[list[str], int]:
    """Catch a batch that is bad on the second rank only, and replay it on both."""
    trainer = make_trainer().attach(LossGuard(folder))
    trainer.run(batches("nan" if dist.get_rank() else None), max_epochs=1)
    dist.barrier()
    path = Path(folder) / f"iteration_0000000{BAD}_rank_0.pt"
    replayed = replay(path, factory)
    return replayed.differing(0.0), replayed.record["rank"]


def test_each_rank_replays_its_own_record(ranks: Ranks, tmp_path):
    assert ranks.run(replayed_on_a_rank, [(str(tmp_path),)] * 2) == [([], 0), ([], 1)]
    with pytest.raises(CheckpointError, match=r"is of 2 ranks, got 1\. Replay it with torchrun"):
        replay(tmp_path / f"iteration_0000000{BAD}_rank_1.pt", factory)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("iteration", "../../elsewhere"),
        ("iteration", None),
        ("ranks", "1"),
        ("rank", True),
        ("terms", [1.0]),
        ("norms", None),
        ("random", 7),
        ("trained", []),
        ("model", None),
        ("loss", 1),
    ],
)
def test_a_record_with_a_part_of_another_type_is_named_with_the_part(tmp_path, part, value):
    path = caught(tmp_path)
    torch.save({**torch.load(path, weights_only=True), part: value}, path)
    with pytest.raises(CheckpointError, match=rf"{path.name} must hold {part} as a .* Restore"):
        replay(path, factory)


def test_the_record_of_another_rank_is_not_read_through_a_link(ranks: Ranks, tmp_path):
    ranks.run(replayed_on_a_rank, [(str(tmp_path / "caught"),)] * 2)
    first, second = sorted((tmp_path / "caught").iterdir())
    second.rename(tmp_path / "elsewhere.pt")
    second.symlink_to(tmp_path / "elsewhere.pt")
    errors = ranks.run(error_of_a_replay, [(str(first),)] * 2)
    assert all("must not be a symbolic link" in error for error in errors)  # no rank waits


def error_of_a_replay(path: str) -> str:
    try:
        replay(path, factory)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_random_state_that_fits_no_generator_is_named(tmp_path):
    path = caught(tmp_path)
    record = torch.load(path, weights_only=True)
    record["random"]["torch"] = record["random"]["torch"][:7]
    torch.save(record, path)
    with pytest.raises(CheckpointError, match="random state cannot be restored"):
        replay(path, factory)
