"""Probes of the emoji's categories, after a few updates of the example's model."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diptych.engine import Evaluator, SeededLoader, Trainer, tasks
from diptych.handlers import (
    KNNAccuracy,
    LinearProbeAccuracy,
    OnlineLinearProbe,
    ZeroShotAccuracy,
)
from diptych.losses import CLIPLoss
from diptych.recipes.towers.small_towers import tokenize
from examples.emoji.data import TrainingPairs, collate, training_drawings
from examples.emoji.model import TwoTowers
from examples.emoji.splits import UNSEEN_EMOJI

WORDS = {
    "smileys-emotion": "face smile",
    "people-body": "person hand",
    "animals-nature": "animal plant",
    "food-drink": "food drink",
    "travel-places": "place building car",
    "activities": "sport game",
    "objects": "tool clothing",
    "symbols": "arrow sign button",
    "flags": "flag",
}


def encode(model: TwoTowers, prompts: list[str]) -> Tensor:
    tokens = pad_sequence([tokenize(prompt) for prompt in prompts], batch_first=True)
    return model.encode_text(tokens)


def labelled(model: TwoTowers, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"features": model.encode_image(batch["image"]), "labels": batch["label"]}


def batches(emoji, drawings, names) -> list[dict[str, Tensor]]:
    images = torch.stack([emoji[i].drawings[style] for i, style in drawings]).float() / 255
    labels = torch.tensor([names.index(emoji[i].category) for i, _ in drawings])
    pieces = zip(images.split(256), labels.split(256), strict=True)
    return [{"image": image, "label": label} for image, label in pieces]


def test_each_probe_tells_categories_of_unseen_emoji_better_than_chance(emoji):
    names = list(WORDS)
    assert {one.category for one in emoji} == set(names)
    seen = batches(emoji, training_drawings(emoji)[::4], names)
    unseen = [(i, "noto") for i, one in enumerate(emoji) if one.split == UNSEEN_EMOJI]
    queries = batches(emoji, unseen, names)
    categories = torch.tensor([names.index(one.category) for one in emoji])

    torch.manual_seed(0)
    model, loss = TwoTowers(), CLIPLoss()
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=2e-3)
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text, device="cpu", seed=0)
    online = OnlineLinearProbe(classes=9, labels=lambda batch: categories[batch["group"]])
    loader = SeededLoader(TrainingPairs(emoji), 64, seed=0, drop_last=True, collate=collate)
    trainer.attach(online).run(loader, max_iters=16)

    zero_shot = ZeroShotAccuracy(
        [WORDS[name] for name in names], templates=["{}", "{} picture"], encode=encode
    )
    metrics = [KNNAccuracy(seen, k=50), LinearProbeAccuracy(seen), zero_shot]
    evaluator = Evaluator(model, task=labelled, metrics=metrics, device="cpu")
    values = evaluator.evaluate(queries)
    largest = float(torch.cat([b["label"] for b in queries]).bincount().max()) / len(unseen)
    assert values["knn_accuracy"] > largest + 0.1
    assert values["linear_probe_accuracy"] > largest + 0.1
    assert values["zero_shot_accuracy"] > 1 / 9 + 0.1
    records = trainer.metrics.record.values
    assert records["train/linear_probe_accuracy"] > 1 / 9 + 0.1
    assert records["train/linear_probe_loss"] < math.log(9)
