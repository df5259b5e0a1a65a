"""The self-supervised example trains by each method, on what its method asks for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diptych.engine import Trainer
from diptych.losses import get_loss
from examples import self_supervised
from examples.emoji import labels
from examples.emoji.data import training_drawings
from examples.self_supervised import METHODS, WithPredictor, WithTarget, main


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_is_probed(method, emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainers = []
    monkeypatch.setattr(
        self_supervised, "Trainer", lambda *a, **k: trainers.append(Trainer(*a, **k)) or trainers[0]
    )
    results = main(method, emoji[::11], epochs=2)
    probes = ["untrained, kNN", "untrained, linear", "kNN", "linear"]
    assert list(results) == ["constant", *probes]
    assert all(0 <= accuracy <= 1 for accuracy in results.values())
    (trainer,) = trainers
    assert trainer.state.iteration == 2
    assert torch.isfinite(torch.tensor(trainer.metrics.get_history("train/loss"))).all()
    assert list((tmp_path / "runs" / method).iterdir())
    if isinstance(trainer.model, WithTarget):
        parts = (trainer.model.online, trainer.model.target)
        pairs = zip(*(part.parameters() for part in parts), strict=True)
        assert not all(torch.equal(online, target) for online, target in pairs)


def test_targets_are_those_of_the_other_view_and_get_no_gradient():
    torch.manual_seed(0)
    model = WithPredictor().eval()
    batch = {"first": torch.rand(3, 3, 32, 32), "second": torch.rand(3, 3, 32, 32)}
    outputs = self_supervised.predictions_and_targets(model, batch)
    torch.testing.assert_close(outputs["targets"][:3], model.target(batch["second"]))
    torch.testing.assert_close(outputs["targets"][3:], model.target(batch["first"]))
    expected = model.predictor(model.online(batch["first"]))
    torch.testing.assert_close(outputs["predictions"][:3], expected)
    assert not outputs["targets"].requires_grad
    assert outputs["predictions"].requires_grad


def test_keys_come_from_the_momentum_encoder():
    model = WithTarget().eval()
    views = {"first": torch.rand(2, 3, 32, 32), "second": torch.rand(2, 3, 32, 32)}
    outputs = self_supervised.queries_and_keys(model, {**views, "group": torch.tensor([3, 5])})
    torch.testing.assert_close(outputs["key"], model.target(views["second"]))
    assert not outputs["key"].requires_grad


def test_a_past_key_of_the_same_emoji_is_no_negative():
    loss = get_loss("moco", dim=4, queue_size=2, temperature=0.5).eval()
    past = torch.nn.functional.normalize(torch.randn(2, 4), dim=1)
    loss.queue.enqueue(past, torch.tensor([3, 7]))
    model = SimpleNamespace(online=nn.Identity(), target=nn.Identity())
    batch = {"first": torch.randn(1, 4), "second": torch.randn(1, 4), "group": torch.tensor([3])}
    query, key = (torch.nn.functional.normalize(batch[view]) for view in ("first", "second"))
    logits = torch.stack([(query * key).sum(), (query[0] * past[1]).sum()]) / 0.5
    value = loss(*self_supervised.queries_and_keys(model, batch).values())
    torch.testing.assert_close(value, logits.logsumexp(0) - logits[0])


def test_only_the_targets_of_byol_are_centred(emoji):
    drawings = labels.labelled_batches(emoji, training_drawings(emoji))[0]["image"]
    shared = {}
    for model in (WithTarget, WithPredictor):
        torch.manual_seed(0)
        targets = torch.nn.functional.normalize(model().target(drawings), dim=1)
        similarity = targets @ targets.T
        shared[model] = similarity[~torch.eye(len(targets), dtype=torch.bool)].mean()
    assert shared[WithTarget] > 0.2
    assert shared[WithPredictor].abs() < 0.05
