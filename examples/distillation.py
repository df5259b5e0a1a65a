"""Distil the emoji model into a student of a tenth of its size, and train the student alone.

    python -m examples.distillation --teacher teacher.pt

Trains the teacher first, unless the file exists. `--help` lists the flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from diptych.engine import Evaluator, SeededLoader, Trainer, tasks
from diptych.handlers import GradientClipping, LearningRate, RetrievalRecall, Teacher
from diptych.losses import CLIPDistillationLoss, CLIPLoss, WeightedSum
from examples.emoji.data import (
    Emoji,
    TrainingPairs,
    collate,
    read_emoji,
    unseen_drawings,
    unseen_emoji,
)
from examples.emoji.model import ImageEncoder, TextEncoder, TwoTowers
from examples.emoji.train import one_side

K = (1, 10)


class Student(TwoTowers):
    """Two narrow towers.

    Args:
        dim: dimension of the features.
    """

    def __init__(self, dim: int = 64) -> None:
        nn.Module.__init__(self)
        self.encode_image = ImageEncoder(dim, width=8)
        self.encode_text = TextEncoder(dim, width=32)


def train(
    model: nn.Module,
    emoji: Sequence[Emoji],
    flags: argparse.Namespace,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """Train a model alone, or with a teacher, and return it."""
    loss: nn.Module = CLIPLoss()
    if teacher is not None:
        # The task's outputs are images, texts and groups; behind them are those of the teacher.
        loss = WeightedSum(
            losses={"clip": loss, "distillation": CLIPDistillationLoss(teacher_temperature=0.05)},
            weights={"clip": 1.0, "distillation": flags.weight},
            inputs={"clip": (0, 1, 2), "distillation": (0, 1, 3, 4)},
        )
    optimizer = torch.optim.Adam(
        [*model.parameters(), *loss.parameters()], lr=2e-3, betas=(0.9, 0.98), fused=True
    )
    loader = SeededLoader(
        TrainingPairs(emoji), 256, seed=flags.seed, drop_last=True, collate=collate
    )
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text, seed=flags.seed, device="cpu")
    trainer.attach(
        LearningRate(warmup=len(loader) * flags.epochs // 10, decay="cosine"),
        GradientClipping(max_norm=1.0),
        *([] if teacher is None else [Teacher(teacher)]),
    )
    trainer.run(loader, max_epochs=flags.epochs)
    return model


def recall(model: nn.Module, emoji: Sequence[Emoji]) -> Mapping[str, float]:
    """Return recall@1 and recall@10, image to text, on both kinds of unseen data."""
    evaluator = Evaluator(model, task=one_side, metrics=[RetrievalRecall(k=K)], device="cpu")
    splits = {"drawing": unseen_drawings(emoji), "emoji": unseen_emoji(emoji)}
    found = {split: evaluator.evaluate(batches) for split, batches in splits.items()}
    return {
        f"unseen {split}, R@{k}": values[f"image_to_text/recall@{k}"]
        for split, values in found.items()
        for k in K
    }


def report(name: str, model: nn.Module, emoji: Sequence[Emoji]) -> None:
    """Print the size and the recall of a model."""
    size = sum(parameter.numel() for parameter in model.parameters())
    values = ", ".join(f"{key} {value:.1%}" for key, value in recall(model, emoji).items())
    print(f"{name}, {size:,} parameters: {values}", flush=True)


def main() -> None:
    """Train the teacher, the student alone, and the student with the teacher."""
    flags = parse_flags()
    emoji = read_emoji()
    torch.manual_seed(0)
    teacher: nn.Module = TwoTowers()
    if flags.teacher.exists():
        teacher.load_state_dict(torch.load(flags.teacher, weights_only=True))
    else:
        train(teacher, emoji, argparse.Namespace(epochs=45, seed=0))
        torch.save(teacher.state_dict(), flags.teacher)
    report("teacher", teacher, emoji)
    for name, taught_by in (("student alone", None), ("student with teacher", teacher)):
        torch.manual_seed(flags.seed)
        report(name, train(Student(), emoji, flags, taught_by), emoji)


def parse_flags() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(
        description="Distil the emoji model into a small student.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--teacher", type=Path, default=Path("teacher.pt"), help="weights; trained if missing")
    add("--epochs", type=int, default=45, help="passes over the training drawings, of a student")
    add("--weight", type=float, default=1.0, help="of the distillation; the other loss has 1")
    add("--seed", type=int, default=0, help="seed of the student, the order and the augmentation")
    return parser.parse_args()


if __name__ == "__main__":
    main()
