"""Overfitting a batch: the verdict, and that nothing is kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import BatchError, SeededLoader, Trainer, tasks
from diptych.engine.random_state import random_state
from diptych.engine.trials.overfit import Overfit


def make_trainer(lr: float = 0.1, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    settings = {"task": tasks.classification, "device": "cpu", **settings}
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, **settings)


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 4, generator=generator)
    return [{"image": image, "label": torch.tensor(i % 3)} for i, image in enumerate(images)]


def test_the_losses_are_those_of_a_plain_loop_on_the_first_batches():
    trainer, loader = make_trainer(), SeededLoader(samples(), 8, shuffle=False)
    found = trainer.overfit(loader, batches=2, updates=7)
    model = make_trainer().model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    expected = []
    for index in range(7):
        batch = list(loader)[index % 2]
        loss = nn.functional.cross_entropy(model(batch["image"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert found.losses == pytest.approx(expected, rel=1e-5)
    assert found.first == pytest.approx(sum(expected[:2]) / 2)
    assert found.last == pytest.approx(sum(expected[-2:]) / 2)


def test_a_model_that_can_learn_learns_and_keeps_nothing():
    trainer, loader = make_trainer(), SeededLoader(samples(), 8)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    own, generators = dict(vars(trainer)), random_state()
    found = trainer.overfit(loader)
    assert found.learns
    assert str(found).startswith("100 updates on 1 batch: loss 1.")
    assert str(found).endswith("it learns")
    assert all(torch.equal(v, weights[n]) for n, v in trainer.model.state_dict().items())
    assert trainer.optimizer.state_dict()["state"] == {}
    assert dict(vars(trainer)) == own
    assert torch.equal(random_state()["torch"], generators["torch"])
    assert loader.state_dict()["batch"] == 0


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"lr": 0.0}, "it does not learn"),
        ({"lr": 1e-3}, "it learns slowly"),
        ({"lr": 1e9}, "it diverges"),
    ],
)
def test_the_verdict_tells_what_to_try(settings, verdict):
    found = make_trainer(**settings).overfit(SeededLoader(samples(), 8), updates=40)
    assert found.verdict.startswith(verdict)
    assert not found.learns


def test_a_loss_that_is_not_finite_diverges():
    assert Overfit((1.0, math.nan)).verdict.startswith("it diverges: the loss is not finite")


def test_a_loss_below_zero_learns_by_falling():
    assert Overfit((-0.1, -0.9)).learns
    assert not Overfit((-0.9, -0.1)).learns


def test_a_step_of_the_users_own_returns_the_loss():
    def step(trainer: Trainer, batch: dict[str, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(trainer.model(batch["image"]), batch["label"])
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        return loss.detach()

    assert make_trainer(step=step).overfit(SeededLoader(samples(), 8)).learns


def test_a_step_that_returns_no_loss_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"step must return the loss, .* got NoneType"):
        make_trainer(step=lambda trainer, batch: None).overfit(SeededLoader(samples(), 8))


def test_an_empty_loader_is_refused():
    with pytest.raises(BatchError, match="at least one batch"):
        make_trainer().overfit([])


@pytest.mark.parametrize("loader", [iter([]), 3, len])
def test_what_cannot_be_iterated_again_is_refused_by_name(loader):
    with pytest.raises(TypeError, match="loader must be an object that can be iterated again"):
        make_trainer().overfit(loader)
