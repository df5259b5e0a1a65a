"""The description that ranks compare holds all that decides the run, and nothing of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ignite
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from diptych.engine import SeededLoader, Trainer
from diptych.engine.data.grouped_loader import in_groups
from diptych.engine.state.rank_agreement import rank_identity, shared_order
from diptych.handlers import Evaluation, GradientClipping, JsonLines, LossGuard, Throughput
from tests.engine.models import TwoTower, paired, trainer_of

SAMPLES = TensorDataset(torch.zeros(12, 2))


def described(trainer: Trainer) -> dict[str, Any]:
    return rank_identity(trainer, {})


def sharded(rank: int, *, seed: int = 0) -> DataLoader[Any]:
    sampler = DistributedSampler(SAMPLES, num_replicas=2, rank=rank, seed=seed)
    return DataLoader(SAMPLES, batch_size=2 + rank, sampler=sampler)


def test_two_trainers_that_are_built_alike_have_one_description():
    assert described(trainer_of()) == described(trainer_of())


def test_a_module_of_another_class_or_with_another_attribute_is_seen():
    one, other = (trainer_of(TwoTower(lambda p=p: nn.Dropout(p)).double()) for p in (0.1, 0.2))
    assert (
        described(one)["modules"]["model.image.1"] != described(other)["modules"]["model.image.1"]
    )


def test_an_attribute_that_counts_during_a_run_is_compared_only_before_it():
    counting, fresh = trainer_of(), trainer_of()
    for trainer in (counting, fresh):
        trainer.run([paired(4)], max_epochs=1)
    counting.model.calls = 7
    assert described(counting) == described(fresh)
    assert described(trainer_of(counting.model))["modules"]["model"]["calls"] == 7


@pytest.mark.parametrize(
    ("name", "value", "compared"),
    [("local_rank", 1, False), ("device", "cuda:1", False), ("margin", 0.2, True)],
)
def test_an_attribute_that_holds_the_rank_or_its_device_is_a_ranks_own(name, value, compared):
    trainer, plain = trainer_of(), trainer_of()
    setattr(trainer.loss, name, value)
    assert (described(trainer) != described(plain)) == compared


def test_a_root_in_eval_mode_is_described_as_the_trainer_will_have_it():
    trainer = trainer_of()
    trainer.model.eval()
    assert described(trainer) == described(trainer_of())
    trainer.model.train()
    trainer.model.text.eval()
    assert not described(trainer)["training"]["model.text"]


def test_handlers_that_change_or_communicate_are_described_without_their_data(tmp_path: Path):
    attached = [JsonLines(tmp_path), Throughput(), GradientClipping(max_norm=1.0)]
    trainer = trainer_of().attach(*attached, Evaluation([paired(4)]), LossGuard(tmp_path))
    found = described(trainer)
    assert found["order"] == ["GradientClipping", "Evaluation[val]", "LossGuard"]
    assert found["handlers"]["GradientClipping"]["max_norm"] == 1.0
    assert found["handlers"]["Evaluation[val]"]["loader"] == "data"
    assert found["handlers"]["LossGuard"]["directory"] == "data"


def test_loaders_that_share_a_data_set_must_order_it_alike():
    assert shared_order(sharded(0)) == shared_order(sharded(1))
    assert shared_order(sharded(0)) != shared_order(sharded(1, seed=1))
    loaders = [SeededLoader(SAMPLES, 4, seed=seed) for seed in (0, 0, 1)]
    first, alike, other = map(shared_order, loaders)
    assert first == alike != other
    assert shared_order(SeededLoader(SAMPLES, 4, shuffle=False)) != first
    assert shared_order(SeededLoader(SAMPLES, 6)) != first


def test_a_loader_of_a_ranks_own_data_has_nothing_to_compare():
    assert shared_order([paired(4)]) == shared_order(DataLoader(SAMPLES)) == {}


def test_groups_of_batches_are_compared_with_their_loader():
    two, three = (in_groups(SeededLoader(SAMPLES, 4), count) for count in (2, 3))
    assert shared_order(two) != shared_order(three)


def test_versions_are_compared(monkeypatch: pytest.MonkeyPatch):
    before = described(trainer_of())["versions"]
    monkeypatch.setattr(ignite, "__version__", "0.0")
    assert described(trainer_of())["versions"] == {**before, "ignite": "0.0"}
