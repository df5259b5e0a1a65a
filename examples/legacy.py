"""Migration: a monolithic trainer and a Trainer with handlers, which end with the same weights.

python -m examples.legacy
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import (
    CheckpointManager,
    EarlyStopping,
    Evaluation,
    GradientClipping,
    LearningRate,
    RetrievalRecall,
    new_run,
)
from diptych.losses import CLIPLoss
from examples.emoji.data import Batch, Emoji, TrainingPairs, collate, read_emoji, unseen_drawings
from examples.emoji.model import TwoTowers
from examples.emoji.train import one_side

WARMUP, RATE, PATIENCE, METRIC = 2, 2e-3, 2, "val/image_to_text/recall@1"
Run = tuple[dict[str, Tensor], dict[str, list[float]]]


class MonolithicTrainer:
    """A trainer class with loop, schedule, clipping, evaluation, best weights and patience."""

    def __init__(self, model: nn.Module, loss: nn.Module, optimizer: Any, path: Path) -> None:
        self.model, self.loss, self.optimizer, self.path = model, loss, optimizer, path
        self.history: dict[str, list[float]] = {"train/loss": [], METRIC: []}
        self.iteration = 0

    def train(self, loader: SeededLoader, held_out: list[Batch], epochs: int) -> None:
        """Train until the recall has not improved for `PATIENCE` epochs."""
        total, waited = epochs * len(loader), 0
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            self.model.train()
            losses = [self.train_step(batch, total) for batch in loader]
            recall = self.evaluate(held_out)
            waited = 0 if recall > max(self.history[METRIC], default=-1.0) else waited + 1
            if waited == 0:
                torch.save(self.model.state_dict(), self.path)
            self.history["train/loss"].append(sum(losses) / len(losses))
            self.history[METRIC].append(recall)
            if waited == PATIENCE:
                break

    def train_step(self, batch: Batch, total: int) -> float:
        """Make one update; return its loss, which makes the host wait for the device."""
        self.iteration += 1
        factor = self.iteration / WARMUP
        if self.iteration > WARMUP:
            done = (self.iteration - 1 - WARMUP) / (total - WARMUP)
            factor = (1 + math.cos(math.pi * done)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * factor
        self.optimizer.zero_grad()
        loss = self.loss(*self.model(batch["image"], batch["text"]), batch["group"])
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.loss.temperature.constrain()
        return loss.item()

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> float:
        """Return the share of images whose nearest caption is the image's own."""
        self.model.eval()
        images = [
            (self.model.encode_image(b["image"]), b["group"]) for b in batches if "image" in b
        ]
        texts = [(self.model.encode_text(b["text"]), b["group"]) for b in batches if "text" in b]
        (image, own), (text, groups) = (
            map(torch.cat, zip(*x, strict=True)) for x in (images, texts)
        )
        nearest = (F.normalize(image) @ F.normalize(text).T).argmax(dim=1)
        return (groups[nearest] == own).double().mean().item()


def parts(emoji: Sequence[Emoji]) -> tuple[nn.Module, nn.Module, Any, SeededLoader]:
    """Return model, loss, optimizer and loader, the same each time."""
    torch.manual_seed(0)
    model, loss = TwoTowers(), CLIPLoss()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=RATE)
    loader = SeededLoader(TrainingPairs(emoji), 64, seed=0, collate=collate)
    return model, loss, optimizer, loader


def monolithic(emoji: Sequence[Emoji], epochs: int, folder: Path) -> Run:
    """Train with the monolithic trainer; return the weights and the history."""
    model, loss, optimizer, loader = parts(emoji)
    trainer = MonolithicTrainer(model, loss, optimizer, folder / "best.pt")
    torch.manual_seed(1)
    trainer.train(loader, unseen_drawings(emoji), epochs)
    return model.state_dict(), trainer.history


def with_handlers(emoji: Sequence[Emoji], epochs: int, folder: Path) -> Run:
    """Train with a `Trainer` and handlers; return the weights and the history."""
    model, loss, optimizer, loader = parts(emoji)
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text, seed=1)
    recall = RetrievalRecall(k=(1,))
    trainer.attach(
        LearningRate(warmup=WARMUP, decay="cosine"),
        GradientClipping(max_norm=1.0),
        Evaluation(unseen_drawings(emoji), metrics=[recall], task=one_side),
        EarlyStopping(metric=METRIC, patience=PATIENCE),
        CheckpointManager(folder / "checkpoints", best=METRIC, keep=1),
    )
    trainer.run(loader, max_epochs=epochs)
    history = {name: trainer.metrics.get_history(name) for name in ("train/loss", METRIC)}
    return model.state_dict(), history


if __name__ == "__main__":
    emoji, folder = read_emoji()[::4], new_run("runs", "legacy")
    folder.mkdir(parents=True, exist_ok=True)
    before, after = (train(emoji, 3, folder) for train in (monolithic, with_handlers))
    print("equal weights:", all(torch.equal(before[0][key], after[0][key]) for key in before[0]))
    for history in (before[1], after[1]):
        print({name: [round(value, 6) for value in values] for name, values in history.items()})
