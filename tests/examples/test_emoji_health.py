"""The emoji example is healthy from start to end; each planted fault is found and named."""

from __future__ import annotations

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import GradientClipping, LearningRate
from diptych.handlers.evaluation.evaluation import Evaluation
from diptych.handlers.health.representation_health import RepresentationHealth
from diptych.losses import CLIPLoss
from diptych.recipes.towers.small_towers import tokenize
from examples.emoji.data import TrainingPairs, collate
from examples.emoji.model import TwoTowers

BATCH_SIZE = 32


class Distance(nn.Module):
    """Brings pairs together, and has nothing that keeps strangers apart."""

    couples_samples = False

    def forward(self, first: Tensor, second: Tensor, groups: Tensor | None = None) -> Tensor:
        return (F.normalize(first) - F.normalize(second)).square().sum(1).mean()


class Narrow(nn.Module):
    """An encoder with a bottleneck."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.down, self.up = encoder, nn.Linear(256, width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(self.encoder(x)))


def shuffled(samples):
    batch = collate(samples)
    return {**batch, "text": batch["text"][torch.randperm(len(samples))]}


def make_trainer(model, loss=None, *, task=tasks.image_text, held=None, **settings) -> Trainer:
    loss = CLIPLoss(**settings) if loss is None else loss
    held = [*model.parameters(), *loss.parameters()] if held is None else held
    optimizer = torch.optim.Adam(held, lr=2e-3, betas=(0.9, 0.98))
    trainer = Trainer(model, loss, optimizer, task=task, device="cpu", seed=0, log_every=2)
    return trainer.attach(LearningRate(warmup=4, decay="constant"), GradientClipping(max_norm=1.0))


def run(trainer: Trainer, emoji, iterations=26, *, collate=collate, pairs=None, size=BATCH_SIZE):
    health = RepresentationHealth(every=2, warmup=8)
    pairs = TrainingPairs(emoji) if pairs is None else pairs
    loader = SeededLoader(pairs, size, seed=0, drop_last=True, collate=collate)
    trainer.attach(health).run(loader, max_iters=iterations)
    return {finding.rule: finding for finding in health.findings}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoTowers()


def test_a_healthy_run_is_left_in_peace(model, emoji, caplog):
    assert run(make_trainer(model), emoji, iterations=40) == {}
    assert caplog.records == []


def test_a_collapsed_encoder_is_found(model, emoji, caplog):
    findings = run(make_trainer(model, Distance()), emoji)
    assert "collapsed" in findings
    assert "captions shuffled" not in findings
    assert "image features have spread 0.0" in findings["collapsed"].evidence
    assert str(findings["collapsed"]) in [" ".join(text.split()) for text in caplog.messages]
    assert all(len(line) <= 120 for text in caplog.messages for line in text.splitlines())
    assert all(record.levelname == "WARNING" for record in caplog.records)


def test_captions_in_another_order_in_each_batch_are_found(model, emoji):
    findings = run(make_trainer(model), emoji, collate=shuffled)
    assert set(findings) == {"captions shuffled"}
    assert "AUROC 0.5" in findings["captions shuffled"].evidence or (
        "AUROC 0.4" in findings["captions shuffled"].evidence
    )


@pytest.mark.slow
def test_captions_that_belong_to_others_for_good_are_found_with_held_out_pairs(model, emoji):
    chosen = emoji[::12]
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(1)).tolist()
    wrong = [
        attrs.evolve(one, name=chosen[i].name, keywords=chosen[i].keywords)
        for one, i in zip(chosen, order, strict=True)
    ]
    pairs = TrainingPairs(wrong)
    others = TrainingPairs(emoji[6::12])
    held_out = SeededLoader(others, 64, shuffle=False, drop_last=True, collate=collate)
    trainer = make_trainer(model).attach(Evaluation(held_out, every=4, loss=False))
    findings = run(trainer, emoji, iterations=40, pairs=pairs)
    assert set(findings) == {"captions shuffled"}
    assert "memorised" in findings["captions shuffled"].evidence


def test_a_tower_that_the_optimizer_does_not_hold_is_found(model, emoji):
    trainer = make_trainer(model, held=[*model.encode_text.parameters()], learn_temperature=False)
    findings = run(trainer, emoji)
    assert set(findings) == {"frozen tower"}
    assert "no weight of encode_image has changed" in findings["frozen tower"].evidence


@pytest.mark.slow
def test_a_tower_that_is_frozen_on_purpose_is_left_in_peace(model, emoji):
    model.encode_image.requires_grad_(False)
    assert run(make_trainer(model), emoji) == {}


def test_captions_that_others_of_the_batch_have_too_are_found(model, emoji):
    captions = pad_sequence([tokenize(one.category) for one in emoji], batch_first=True)

    def by_category(samples):
        batch = collate(samples)
        return {**batch, "text": captions[batch["group"]]}

    task = tasks.image_text.with_keys(group="none")
    findings = run(make_trainer(model, task=task), emoji, collate=by_category)
    assert set(findings) == {"batch full of false negatives"}
    assert "100% of the samples" in findings["batch full of false negatives"].evidence


@pytest.mark.slow
def test_a_bottleneck_is_found(model, emoji):
    model.encode_image = Narrow(model.encode_image, 3)
    # In a batch of 32, three directions are too many of the possible ones to count as few.
    findings = run(make_trainer(model), emoji, iterations=16, size=128)
    assert set(findings) == {"partly collapsed"}
    assert "image features use" in findings["partly collapsed"].evidence


@pytest.mark.slow
def test_a_temperature_at_its_bound_is_found(model, emoji):
    trainer = make_trainer(model, temperature=0.2, max_logit_scale=5.0)
    findings = run(trainer, emoji, iterations=40)
    assert set(findings) == {"temperature saturated"}


def test_a_run_that_learns_nothing_since_nothing_moves_is_stuck(model, emoji):
    trainer = make_trainer(model.requires_grad_(False))
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    findings = run(trainer, emoji)
    assert set(findings) == {"stuck at chance"}
    assert "encode_image and encode_text not changing" in findings["stuck at chance"].evidence
