"""Each parameter of the optimizer that no gradient reaches in a whole window is named once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import Trainer
from diptych.handlers import LossGuard
from tests.engine.models import CoupledLoss, TwoTower, paired, trainer_of

NAME = "diptych.engine.step.untrained"


class Extra(TwoTower):
    """Two towers and parameters that the features use in some calls only."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.late = nn.Linear(2, 2), nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        image, text = super().forward(image, text)
        return (self.late * image if self.calls % 4 == 3 else image), text


def messages(trainer: Trainer, caplog: pytest.LogCaptureFixture, **limits: Any) -> list[str]:
    trainer.run([paired(4)] * 4, **limits)
    return [one.getMessage() for one in caplog.records if one.name == NAME]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("make", [sgd, torch.optim.AdamW])
def test_a_parameter_without_a_gradient_is_named_once(
    make: Callable[[Any], torch.optim.Optimizer], caplog: pytest.LogCaptureFixture
) -> None:
    model, loss = Extra().double(), CoupledLoss().double()
    optimizer = make([*model.parameters(), *loss.parameters()])
    found = messages(trainer_of(model, loss, optimizer=optimizer), caplog, max_epochs=3)
    assert len(found) == 1
    assert "In iterations 1 to 4 no gradient reached never.weight, never.bias:" in found[0]


def test_a_window_is_what_lies_between_two_log_points(caplog: pytest.LogCaptureFixture) -> None:
    found = messages(trainer_of(Extra().double(), log_every=2), caplog, max_epochs=2)
    assert len(found) == 1
    assert "In iterations 1 to 2 no gradient reached late, never.weight, never.bias:" in found[0]


def test_frozen_parameters_and_those_of_no_optimizer_are_not_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, loss = Extra().double(), CoupledLoss().double()
    model.never.weight.requires_grad_(False)
    held = [p for p in model.parameters() if p is not model.never.bias]
    trainer = trainer_of(model, loss, optimizer=sgd([*held, *loss.parameters()]))
    assert not messages(trainer, caplog)


def test_a_window_without_any_update_names_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Large(CoupledLoss):
        minimum_batch = 5

    assert not messages(trainer_of(Extra().double(), Large().double()), caplog)


class BreaksAt(CoupledLoss):
    """Is NaN from one of its calls on."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = call

    def terms(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        self.left -= 1
        factor = 1.0 if self.left > 0 else torch.nan
        return {name: factor * term for name, term in super().terms(image, text).items()}


def test_the_first_nan_of_the_loss_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(TwoTower().double(), BreaksAt(6).double(), log_every=2)
    found = messages(trainer, caplog, max_epochs=3)
    assert len(found) == 1
    assert found[0].startswith("train/loss is NaN in iterations 5 to 6")
    assert "LossGuard()" in found[0]


def test_a_guard_that_leaves_nan_out_needs_no_report(caplog: pytest.LogCaptureFixture) -> None:
    guarded = trainer_of(TwoTower().double(), BreaksAt(1).double(), log_every=2)
    guarded.attach(LossGuard(policy="skip"))
    assert not messages(guarded, caplog)
