"""The certificate passes a sound training and names planted faults."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from ignite.engine import Events
from torch import nn

from diptych.engine import Change, StepEvents, Trainer, certify
from diptych.engine.certificate.handler_changes import check_handlers, snapshot
from diptych.engine.certificate.report import Check
from diptych.engine.certificate.training_copy import TrainingCopy
from diptych.engine.step import microbatch
from diptych.handlers import GradientClipping, default_handlers
from diptych.losses import CLIPLoss
from tests.engine.certificate.trainings import (
    DenyingLoss,
    add_noise,
    apply_draws,
    centre,
    pairs,
    trainer_of,
    with_draws,
)


def checks_of(trainer: Trainer, **options: Any) -> dict[str, Check]:
    report = certify(trainer, pairs(), ranks=False, **options)
    assert report.passed == all(check.passed for check in report.checks)
    return {check.way: check for check in report.checks}


def states(trainer: Trainer) -> Any:
    parts = (trainer.model, trainer.loss, trainer.optimizer, trainer.metrics)
    return copy.deepcopy([part.state_dict() for part in parts])


def test_a_sound_training_passes_and_is_left_as_it_was(tmp_path):
    trainer = trainer_of().attach(*default_handlers(tmp_path))
    trainer.run([pairs()] * 2, max_epochs=1)
    before, draws, iteration = states(trainer), torch.get_rng_state(), trainer.state.iteration
    checks = checks_of(trainer)
    watched = f"with {len(trainer.handlers)} handlers"
    assert list(checks) == ["the whole batch", "micro-batches of 3", "tiles of 3", watched]
    assert all(check.passed and check.error < 1e-8 for check in checks.values())
    assert trainer.state.iteration == iteration
    assert torch.get_rng_state().equal(draws)
    assert str(states(trainer)) == str(before)


def test_the_report_is_a_table_with_a_verdict_for_each_way():
    report = certify(trainer_of(nn.BatchNorm1d(5)), pairs(), microbatch_size=4, ranks=False)
    lines = str(report).splitlines()
    assert lines[0].split() == ["run", "as", "relative", "error", "verdict", "why"]
    assert any("micro-batches of 4" in line and "CHANGES" in line for line in lines)
    assert not report.passed


def test_batch_norm_is_found_and_named():
    checks = checks_of(trainer_of(nn.BatchNorm1d(5)))
    assert "batch norm" in checks["micro-batches of 3"].remark
    assert "image.1" in checks["micro-batches of 3"].remark
    assert checks["tiles of 3"].passed


def test_dropout_is_replayed_and_a_missing_replay_is_found(monkeypatch):
    way = "micro-batches, dropout on"
    assert checks_of(trainer_of(nn.Dropout(0.5)))[way].passed
    monkeypatch.setattr(microbatch, "set_forward_random_state", lambda *_: None)
    check = checks_of(trainer_of(nn.Dropout(0.5)))[way]
    assert not check.passed
    assert "no replay" in check.remark


@pytest.mark.parametrize("transform", [add_noise, centre])
def test_a_transform_takes_part_and_may_draw(transform):
    checks = checks_of(trainer_of(transform=transform))
    assert all(check.passed and check.error < 1e-8 for check in checks.values())


def test_a_transform_that_computes_in_float32_is_certified_in_float64():
    report = certify(trainer_of(transform=apply_draws), with_draws(), ranks=False)
    assert all(check.passed and check.error < 1e-8 for check in report.checks)


def test_a_transform_that_is_no_function_of_its_batch_is_found():
    class Counting:
        calls = 0

        def __call__(self, batch: Any) -> Any:
            Counting.calls += 1
            return {**batch, "image": batch["image"] + Counting.calls}

    assert not checks_of(trainer_of(transform=Counting()))["the whole batch"].passed


class DenyingByProperty(CLIPLoss):
    """A loss that computes what it declares, as a weighted sum of losses does."""

    @property
    def couples_samples(self) -> bool:
        return False


@pytest.mark.parametrize("kind", [DenyingLoss, DenyingByProperty])
def test_a_loss_that_denies_to_couple_its_samples_is_found(kind):
    check = checks_of(trainer_of(loss=kind()))["micro-batches of 3"]
    assert not check.passed
    assert "couples_samples=False" in check.remark


def _halve(rates: list[dict[str, Any]]) -> None:
    for group in rates:
        group["lr"] /= 2


CHANGES: dict[str, Callable[[Trainer], object]] = {
    "weights": lambda trainer: trainer.model.text.bias.data.add_(1e-3),
    "gradients": lambda trainer: trainer.model.text.bias.grad.mul_(2),
    "buffers": lambda trainer: trainer.model.image[1].running_mean.add_(1),
    "rates": lambda trainer: _halve(trainer.optimizer.param_groups),
    "trainable parameters": lambda trainer: trainer.model.text.requires_grad_(False),
    "training mode": lambda trainer: trainer.model.text.eval(),
    "batch": lambda trainer: trainer.state.batch["text"].mul_(2),
    "loss": lambda trainer: setattr(trainer.loss, "label_smoothing", 0.25),
    "length of the run": lambda trainer: trainer.terminate(),
    "random numbers": lambda trainer: torch.rand(3),
}


@attrs.define
class Meddler:
    """A handler that changes one part of a run."""

    kind: str
    every: int | None = None
    changes: tuple[str, ...] = ()

    def attach(self, trainer: Trainer) -> None:
        if self.every:
            trainer.every(self.every, self.meddle, Events.ITERATION_COMPLETED)
        else:
            trainer.add_event_handler(StepEvents.GRADIENTS_READY, self.meddle)

    def meddle(self, trainer: Trainer) -> None:
        CHANGES[self.kind](trainer)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_that_a_handler_does_not_declare_is_found_and_undone(kind: str):
    trainer = trainer_of(nn.BatchNorm1d(5)).attach(Meddler(kind))
    before = snapshot(trainer)
    check = check_handlers(trainer, pairs())
    assert not check.passed
    assert check.remark == f"Meddler.meddle changes {kind}"
    assert str(snapshot(trainer)) == str(before)


@pytest.mark.parametrize("kind", ["weights", "random numbers"])
def test_a_handler_with_a_period_is_called_in_any_iteration(kind: str):
    check = check_handlers(trainer_of().attach(Meddler(kind, every=1000)), pairs())
    assert check.remark == f"Meddler.meddle changes {kind}"


@pytest.mark.parametrize("kind", CHANGES)
def test_a_handler_that_declares_its_changes_passes_and_is_named(kind: str):
    trainer = trainer_of(nn.BatchNorm1d(5)).attach(Meddler(kind, changes=(kind,)))
    check = check_handlers(trainer, pairs())
    assert check.passed
    assert check.remark == f"Meddler.meddle changes {kind}, as declared"


def test_every_part_of_a_run_that_a_handler_may_change_is_observed():
    assert set(snapshot(trainer_of())) == set(Change)
    assert set(CHANGES) == {change.value for change in Change}


def test_a_copy_takes_every_argument_of_the_trainer():
    trainer = trainer_of()
    copied = TrainingCopy.of(trainer, trainer.device, None)
    parameters = inspect.signature(Trainer).parameters
    assert set(copied.arguments) == set(parameters) - {"model", "loss", "optimizer"}


def test_gradient_clipping_declares_its_work():
    trainer = trainer_of().attach(GradientClipping(max_norm=1e-3))
    check = checks_of(trainer)["with 1 handlers"]
    assert check.passed
    assert check.error > 0
    assert "GradientClipping._clip changes gradients, as declared" in check.remark


def test_schedulers_and_optimizers_at_events_do_their_work_and_are_left_as_they_were():
    trainer = trainer_of()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
    other = torch.optim.SGD([trainer.model.text.bias], lr=0.1)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, scheduler.step)
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, other.step)
    before = states(trainer)
    check = check_handlers(trainer, pairs())

    assert check.passed
    assert check.remark == (
        "SGD.step changes weights, as declared; ExponentialLR.step changes rates, as declared"
    )
    assert str(states(trainer)) == str(before)
    assert scheduler.last_epoch == 0


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="at least 4 samples, got 3"):
        certify(trainer_of(), pairs(3), ranks=False)


def test_a_model_that_holds_on_to_its_precision_is_certified_in_that():
    class Single(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.ones(5, 5)

    checks = checks_of(trainer_of(Single()))
    assert checks["micro-batches of 3"].passed
    assert checks["micro-batches of 3"].error < 1e-3
