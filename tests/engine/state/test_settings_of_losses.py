"""Settings of a loss: kept by a resumed run as they were set during training, and compared."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import nn

from diptych.engine import Trainer
from diptych.engine.state.run_state import load_run_state, run_state
from diptych.losses import (
    CLIPLoss,
    HardNegativeLoss,
    HybridLoss,
    InfoNCELoss,
    MatryoshkaLoss,
    OneOf,
    SigLIPLoss,
    TripletLoss,
    WeightedSum,
)
from tests.engine.state.scripts import lines

Change = Callable[[Any], None]


def parts() -> dict[str, nn.Module]:
    return {"clip": CLIPLoss(), "siglip": SigLIPLoss()}


def change(path: str, value: object) -> Change:
    """Return a function that sets an attribute, or an item of a dictionary, of a loss."""

    def apply(loss: nn.Module) -> None:
        *names, last = path.split(".")
        for name in names:
            loss = getattr(loss, name)
        if isinstance(loss, dict):
            loss[int(last) if last.isdigit() else last] = value
        else:
            setattr(loss, last, value)

    return apply


SET: list[tuple[Callable[[], nn.Module], str, object, str]] = [
    (InfoNCELoss, "temperature.value", 0.5, "temperature.value 0.05 -> 0.5"),
    (HybridLoss, "alpha", 0.75, "alpha 0.0 -> 0.75"),
    (TripletLoss, "negatives", "hardest", "negatives sum -> hardest"),
    (HardNegativeLoss, "negatives.beta", 2.0, "negatives.beta 1.0 -> 2.0"),
    (lambda: OneOf(losses=parts()), "active", "siglip", "active clip -> siglip"),
    (lambda: WeightedSum(losses=parts()), "weights.siglip", 0.25, "weights.siglip 1.0 -> 0.25"),
    (
        lambda: MatryoshkaLoss(loss=CLIPLoss(), dims=(2, 4)),
        "weights.2",
        0.25,
        "weights.2 1.0 -> 0.25",
    ),
]


def built(loss: nn.Module, during: Change | None = None) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    trainer = Trainer(model, loss, optimizer, task=lambda m, b: {"a": m(b), "b": b}, log_every=50)
    if during is not None:
        trainer.add_event_handler(Events.EPOCH_STARTED(once=1), lambda: during(loss))
    return trainer


def run(trainer: Trainer, epochs: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    trainer.run([torch.randn(6, 4, generator=generator)], max_epochs=epochs)
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize(("make", "path", "value", "line"), SET)
def test_what_is_set_during_training_stays_so_after_a_resume(make, path, value, line, caplog):
    during = change(path, value)
    whole = run(built(make(), during), 3)
    unchanged = run(built(make()), 3)
    assert not all(a.equal(b) for a, b in zip(whole, unchanged, strict=True))
    first, file = built(make(), during), io.BytesIO()
    run(first, 1)
    torch.save(run_state(first), file)
    file.seek(0)
    resumed = built(make(), during)
    load_run_state(resumed, torch.load(file, weights_only=True))
    assert all(a.equal(b) for a, b in zip(whole, run(resumed, 3), strict=True))
    assert not lines(caplog)


@pytest.mark.parametrize(("make", "path", "value", "line"), SET)
def test_what_the_script_sets_otherwise_applies_and_is_logged(make, path, value, line, caplog):
    first, loss = built(make()), make()
    run(first, 1)
    change(path, value)(loss)
    load_run_state(built(loss), run_state(first))
    assert any(line in found for found in lines(caplog)), lines(caplog)
    expected = make()
    change(path, value)(expected)
    expected.load_state_dict(loss.state_dict())
    sides = torch.randn(2, 5, 4).unbind()
    assert loss(*sides).allclose(expected(*sides))
