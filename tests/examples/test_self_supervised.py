"""The self-supervised example trains by each method, on what its method asks for."""

from __future__ import annotations

import pytest
import torch

from diptych.engine import Trainer
from examples import self_supervised
from examples.self_supervised import METHODS, Views, main


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_is_probed(method, emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainers = []
    monkeypatch.setattr(
        self_supervised, "Trainer", lambda *a, **k: trainers.append(Trainer(*a, **k)) or trainers[0]
    )
    results = main(method, emoji[::11], epochs=2)
    assert list(results) == ["constant", "untrained", "trained"]
    assert all(0 <= accuracy <= 1 for accuracy in results.values())
    (trainer,) = trainers
    assert trainer.state.iteration == 2
    assert torch.isfinite(torch.tensor(trainer.metrics.get_history("train/loss"))).all()
    assert list((tmp_path / "runs" / method).iterdir())
    same = all(
        torch.equal(a, b)
        for a, b in zip(
            trainer.model.online.parameters(), trainer.model.target.parameters(), strict=True
        )
    )
    assert not same


def test_targets_are_those_of_the_other_view_and_get_no_gradient():
    torch.manual_seed(0)
    model = Views().eval()
    batch = {"first": torch.rand(3, 3, 32, 32), "second": torch.rand(3, 3, 32, 32)}
    outputs = self_supervised.predictions_and_targets(model, batch)
    torch.testing.assert_close(outputs["targets"][:3], model.target(batch["second"]))
    torch.testing.assert_close(outputs["targets"][3:], model.target(batch["first"]))
    expected = model.predictor(model.online(batch["first"]))
    torch.testing.assert_close(outputs["predictions"][:3], expected)
    assert not outputs["targets"].requires_grad
    assert outputs["predictions"].requires_grad


def test_keys_come_from_the_momentum_encoder():
    model = Views().eval()
    batch = {"first": torch.rand(2, 3, 32, 32), "second": torch.rand(2, 3, 32, 32)}
    outputs = self_supervised.queries_and_keys(model, batch)
    torch.testing.assert_close(outputs["key"], model.target(batch["second"]))
    assert not outputs["key"].requires_grad
