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
from diptych.recipes.towers.small_towers import TextEncoder
from examples.emoji.data import (
    Emoji,
    TrainingPairs,
    collate,
    read_emoji,
    unseen_drawings,
    unseen_emoji,
)
from examples.emoji.model import ImageEncoder, TwoTowers
from examples.emoji.train import one_side

K = (1, 10)
SOFT = 0.1  # twice what the contrastive loss learns, so that other pairs than the own one count


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
        distillation = CLIPDistillationLoss(temperature=SOFT, teacher_temperature=SOFT)
        loss = WeightedSum(
            losses={"clip": loss, "distillation": distillation},
            weights={"clip": 1.0, "distillation": flags.weight},
            # The task's outputs are images, texts and groups; behind them are the teacher's two.
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


def compare(emoji: Sequence[Emoji], flags: argparse.Namespace) -> dict[str, Mapping[str, float]]:
    """Return the recall of the teacher, the student alone, and the student with the teacher."""
    teacher = trained_teacher(emoji, flags)
    models = {"teacher": teacher}
    for name, taught_by in (("student alone", None), ("student with teacher", teacher)):
        torch.manual_seed(flags.seed)
        models[name] = train(Student(), emoji, flags, taught_by)
    return {name: recall(model, emoji) for name, model in models.items()}


def trained_teacher(emoji: Sequence[Emoji], flags: argparse.Namespace) -> nn.Module:
    """Return the teacher from its file, which is written if it is missing."""
    torch.manual_seed(0)
    teacher = TwoTowers()
    if flags.teacher.exists():
        teacher.load_state_dict(torch.load(flags.teacher, weights_only=True))
    else:
        train(teacher, emoji, argparse.Namespace(epochs=flags.teacher_epochs, seed=0))
        torch.save(teacher.state_dict(), flags.teacher)
    return teacher


def main() -> None:
    """Train and print a table."""
    flags = parse_flags()
    for model in (TwoTowers(), Student()):
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{type(model).__name__}: {size:,} parameters")
    for name, values in compare(read_emoji(), flags).items():
        print(f"{name:20}", ", ".join(f"{key} {value:.1%}" for key, value in values.items()))


def parse_flags() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(
        description="Distil the emoji model into a small student.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--teacher", type=Path, default=Path("teacher.pt"), help="weights; trained if missing")
    add("--teacher-epochs", type=int, default=45, help="passes over the drawings, of the teacher")
    add("--epochs", type=int, default=45, help="passes over the training drawings, of a student")
    add("--weight", type=float, default=5.0, help="of the distillation; the other loss has 1")
    add("--seed", type=int, default=0, help="seed of the student, the order and the augmentation")
    return parser.parse_args()


if __name__ == "__main__":
    main()
