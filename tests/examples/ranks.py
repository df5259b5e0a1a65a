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

from diptych.engine import Evaluator, SeededLoader, Trainer, of_this_rank, process_group
from diptych.handlers import GradientClipping, LearningRate, RetrievalRecall
from examples.emoji import train
from examples.emoji.data import Emoji, TrainingPairs, collate, read_emoji, unseen_emoji
from examples.emoji.model import TwoTowers
from examples.emoji.results import RANKS

SAMPLES, BATCH_SIZE = 12, 31
"""Each twelfth emoji, and a batch that neither two nor four ranks share equally."""
LONG = 50
"""Updates of a whole run: several epochs, each of which ends with a smaller batch."""


class DoubleTowers(TwoTowers):
    """The example's model in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return super().forward(image.double(), text)


def one_side(model: Any, batch: Any) -> dict[str, Tensor]:
    """The example's task for evaluation, in the model's precision."""
    if "image" in batch:
        batch = {**batch, "image": batch["image"].to(next(model.parameters()).dtype)}
    return train.one_side(model, batch)


def updated(
    emoji: list[Emoji],
    steps: int,
    microbatch_size: int | None = None,
    model: type[TwoTowers] = DoubleTowers,
    epsilon: float | None = None,
) -> dict[str, Any]:
    """Return weights and retrieval metrics after some updates of the example's training."""
    flags = argparse.Namespace(
        seed=0, loss="clip", precision="fp32", microbatch_size=microbatch_size
    )
    before, train.TwoTowers = train.TwoTowers, model
    try:
        trainer = train.build_trainer(flags)
    finally:
        train.TwoTowers = before
    if epsilon is not None:
        trainer.optimizer.param_groups[0]["eps"] = epsilon
    return trained(trainer, emoji, steps)


def trained(trainer: Trainer, emoji: list[Emoji], steps: int) -> dict[str, Any]:
    loader = SeededLoader(TrainingPairs(emoji), BATCH_SIZE, seed=0, collate=collate)
    trainer.attach(LearningRate(warmup=3, decay="cosine"), GradientClipping(max_norm=1.0))
    trainer.run(loader, max_iters=steps)
    parts = {"model": trainer.model, "loss": trainer.loss}
    weights = {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }
    recall = RetrievalRecall(k=RANKS)
    evaluator = Evaluator(trainer.model, task=one_side, metrics=[recall])
    return {"weights": weights, "metrics": evaluator.evaluate(of_this_rank(unseen_emoji(emoji)))}


def run_example(folder: Path) -> dict[str, Any]:
    """Run the script itself, on a few emoji; what it prints is of no interest here."""
    read = train.read_emoji
    train.read_emoji = lambda: read()[::SAMPLES]
    sys.argv = ["train", "--epochs", "1", "--batch-size", "32", "--run-dir", str(folder / "run")]
    train.main()
    return {}


def work(
    rank: int, folder: str, port: int, ranks: int, run: tuple[int, type[TwoTowers], float | None]
) -> None:
    """Be one of the ranks that torchrun would start; after few steps, run the script too."""
    torch.set_num_threads(1)
    steps, model, epsilon = run
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
            found = updated(read_emoji()[::SAMPLES], steps, model=model, epsilon=epsilon)
            torch.save(found, place / f"{rank}.pt")
            if steps < LONG:
                run_example(place)
    except BaseException:
        (place / f"{rank}.txt").write_text(traceback.format_exc())
        raise
