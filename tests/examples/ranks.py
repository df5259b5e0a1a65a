"""The emoji example as one rank of several, in a process of its own."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.engine import SeededLoader, Trainer, process_group
from diptych.handlers import GradientClipping, LearningRate
from examples.emoji import train
from examples.emoji.data import Emoji, TrainingPairs, collate, read_emoji
from examples.emoji.model import TwoTowers

SAMPLES, BATCH_SIZE = 12, 31
"""Each twelfth emoji, and a batch that neither two nor four ranks share equally."""


class DoubleTowers(TwoTowers):
    """The example's model in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return super().forward(image.double(), text)


def updated(
    emoji: list[Emoji], steps: int, microbatch_size: int | None = None
) -> dict[str, Tensor]:
    """Return the weights after some updates of the example's training, in float64."""
    flags = argparse.Namespace(
        seed=0, loss="clip", precision="fp32", microbatch_size=microbatch_size
    )
    before, train.TwoTowers = train.TwoTowers, DoubleTowers
    try:
        trainer = train.build_trainer(flags)
    finally:
        train.TwoTowers = before
    return trained(trainer, emoji, steps)


def trained(trainer: Trainer, emoji: list[Emoji], steps: int) -> dict[str, Tensor]:
    loader = SeededLoader(TrainingPairs(emoji), BATCH_SIZE, seed=0, collate=collate)
    trainer.attach(LearningRate(warmup=3, decay="cosine"), GradientClipping(max_norm=1.0))
    trainer.run(loader, max_iters=steps)
    parts = {"model": trainer.model, "loss": trainer.loss}
    return {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }


def run_example(folder: Path) -> dict[str, Any]:
    """Run the script itself, on a few emoji; what it prints is of no interest here."""
    read = train.read_emoji
    train.read_emoji = lambda: read()[::SAMPLES]
    sys.argv = ["train", "--epochs", "1", "--batch-size", "32", "--run-dir", str(folder / "run")]
    train.main()
    return {}


def work(rank: int, folder: str, port: int, ranks: int, steps: int) -> None:
    """Be one of the ranks that torchrun would start."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    place = Path(folder)
    try:
        with process_group(backend="gloo"):
            weights = updated(read_emoji()[::SAMPLES], steps)
            torch.save(weights, place / f"{rank}.pt")
            run_example(place)
    except BaseException:
        (place / f"{rank}.txt").write_text(traceback.format_exc())
        raise
