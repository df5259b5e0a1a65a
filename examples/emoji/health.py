"""Train the example unchanged and with each of several faults, and draw its health curves.

    python -m examples.emoji.health

Takes some three minutes on two CPU cores, and writes `docs/guide/pictures/health_*.svg`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diptych.engine import MetricsEvents, SeededLoader, Trainer, tasks
from diptych.handlers import Finding, GradientClipping, LearningRate, RepresentationHealth
from diptych.losses import CLIPLoss
from diptych.recipes.towers.small_towers import tokenize
from examples.emoji.curves import picture
from examples.emoji.data import Emoji, TrainingPairs, collate, read_emoji
from examples.emoji.model import TwoTowers

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "guide" / "pictures"
BATCH_SIZE, WARMUP = 64, 10


@attrs.define(kw_only=True)
class Parts:
    """The parts of a run; a fault changes one of them.

    Attributes:
        emoji: the data set.
        model: the two towers.
        loss: the loss.
        task: the task.
        collate: turns samples into a batch.
        lr: the learning rate.
    """

    emoji: list[Emoji]
    model: TwoTowers = attrs.field(factory=TwoTowers)
    loss: nn.Module = attrs.field(factory=CLIPLoss)
    task: Any = tasks.image_text
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]] = collate
    lr: float = 2e-3


class Attraction(nn.Module):
    """A loss that pulls pairs together, without negatives to push others apart."""

    couples_samples = False

    def forward(self, first: Tensor, second: Tensor, groups: Tensor | None = None) -> Tensor:
        """Return the mean squared distance of pairs; groups are ignored."""
        del groups
        return (F.normalize(first) - F.normalize(second)).square().sum(1).mean()


class Bottleneck(nn.Module):
    """An encoder whose features have only two dimensions."""

    def __init__(self, encoder: nn.Module, dim: int = 256) -> None:
        super().__init__()
        self.encoder, self.down, self.up = encoder, nn.Linear(dim, 2), nn.Linear(2, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [B, D]."""
        features: Tensor = self.up(self.down(self.encoder(x)))
        return features


def collapsed(parts: Parts) -> None:
    """Replace the loss with one that has no negatives."""
    parts.loss = Attraction()


def partly_collapsed(parts: Parts) -> None:
    """Pass the image features through a bottleneck of two numbers."""
    parts.model.encode_image = Bottleneck(parts.model.encode_image)  # type: ignore[assignment]


def captions_shuffled(parts: Parts) -> None:
    """Shuffle the captions of each batch."""

    def shuffled(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(samples)
        return {**batch, "text": batch["text"][torch.randperm(len(samples))]}

    parts.collate = shuffled


def stuck_at_chance(parts: Parts) -> None:
    """Set the learning rate to 0."""
    parts.lr = 0.0


def frozen_tower(parts: Parts) -> None:
    """Detach the output of the image tower, so that no gradient reaches it."""
    encoder = parts.model.encode_image
    encoder.register_forward_hook(lambda _, __, output: output.detach())


def temperature_saturated(parts: Parts) -> None:
    """Bound the temperature far too high."""
    parts.loss = CLIPLoss(temperature=0.2, max_logit_scale=5.0)


def false_negatives(parts: Parts) -> None:
    """Use the category as the caption of each drawing, and hide which captions are equal."""
    captions = pad_sequence([tokenize(one.category) for one in parts.emoji], batch_first=True)

    def by_category(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(samples)
        return {**batch, "text": captions[batch["group"]]}

    parts.collate = by_category
    parts.task = tasks.image_text.with_keys(group="none")


FAULTS: dict[str, Callable[[Parts], None] | None] = {
    "healthy": None,
    "collapsed": collapsed,
    "partly_collapsed": partly_collapsed,
    "captions_shuffled": captions_shuffled,
    "stuck_at_chance": stuck_at_chance,
    "frozen_tower": frozen_tower,
    "temperature_saturated": temperature_saturated,
    "false_negatives": false_negatives,
}


def run(
    plant: Callable[[Parts], None] | None, emoji: list[Emoji], iterations: int
) -> tuple[list[tuple[int, Mapping[str, float]]], list[Finding]]:
    """Train, with a fault or without; return the health records and the findings."""
    torch.manual_seed(0)
    parts = Parts(emoji=emoji)
    if plant is not None:
        plant(parts)
    parameters = [*parts.model.parameters(), *parts.loss.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=parts.lr, betas=(0.9, 0.98))
    trainer = Trainer(
        parts.model, parts.loss, optimizer, task=parts.task, seed=0, log_every=5, device="cpu"
    )
    health = RepresentationHealth(every=5, warmup=iterations // 3)
    trainer.attach(
        LearningRate(warmup=WARMUP, decay="constant"), GradientClipping(max_norm=1.0), health
    )
    records: list[tuple[int, Mapping[str, float]]] = []

    @trainer.on(MetricsEvents.LOGGED)
    def keep() -> None:
        record = trainer.metrics.record
        if "health/auroc" in record.values:
            records.append((record.step, record.values))

    pairs = TrainingPairs(emoji)
    loader = SeededLoader(pairs, BATCH_SIZE, seed=0, drop_last=True, collate=parts.collate)
    trainer.run(loader, max_iters=iterations)
    return records, health.findings


def main() -> None:
    """Run the training with every fault, and write its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=120, help="updates per run")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder for the pictures")
    flags = parser.parse_args()
    emoji = read_emoji()
    flags.out.mkdir(parents=True, exist_ok=True)
    for name, plant in FAULTS.items():
        records, findings = run(plant, emoji, flags.iterations)
        path = flags.out / f"health_{name}.svg"
        path.write_text(picture(records, findings), encoding="utf-8")
        print(f"{path.name}: {'; '.join(str(finding) for finding in findings) or 'healthy'}")


if __name__ == "__main__":
    main()
