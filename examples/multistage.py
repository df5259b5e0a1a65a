"""Stages: train from scratch in seven stages, or from pretrained towers in three.

python -m examples.multistage --preset from_scratch --steps 495
python -m examples.multistage --preset pretrained --steps 165 --weights <checkpoint of emoji.train>
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from diptych.engine import Evaluator, SeededLoader, Trainer
from diptych.handlers import (
    GradientClipping,
    LearningRate,
    RetrievalRecall,
    Stage,
    StagePlan,
    default_handlers,
    new_run,
)
from diptych.losses import CLIPLoss, HardNegativeLoss, NTXentLoss, OneOf
from examples.emoji.data import TrainingPairs, read_emoji, unseen_drawings, unseen_emoji
from examples.emoji.fused import FusedTowers, captions, images, pairs, with_second_view
from examples.emoji.results import RANKS, recall_of, results_table

PROJECTIONS = ["encode_image.projection", "encode_text.hidden", "encode_text.shortcut", "loss"]
UPPER = ["encode_image.blocks.2", *PROJECTIONS, "fusion"]


def plan_of(preset: str, steps: int) -> StagePlan:
    """Return the stages of a preset, about `steps` updates in all."""

    def stage(name: str, share: float, lr: float, **rest: Any) -> Stage:
        own = max(1, round(share * steps))
        schedule = LearningRate(warmup=own // 10, decay="cosine", floor=0.05)
        return Stage(name, steps=own, lr=lr, schedule=schedule, **rest)

    hard = {"loss": "hard", "layer_decay": {"encode_image.blocks": 0.7}}
    three = [stage("projections", 0.2, 1e-3, trains=PROJECTIONS, loss="pairs"),
             stage("fusion", 0.2, 1e-3, trains=["fusion", "loss"]),
             stage("everything, hard negatives", 0.6, 5e-4, **hard)]  # fmt: skip
    seven = [stage("images alone", 0.1, 2e-3, trains="encode_image", loss="views", task=images),
             stage("captions alone", 0.05, 2e-3, trains="encode_text", task=captions),
             stage("cross-modal: projections", 0.05, 2e-3, trains=PROJECTIONS, loss="pairs"),
             stage("cross-modal: fusion", 0.05, 2e-3, trains=["fusion", "loss"]),
             stage("cross-modal: upper layers", 0.1, 2e-3, trains=UPPER),
             stage("end-to-end", 0.5, 2e-3),
             stage("end-to-end, hard negatives", 0.15, 5e-4, **hard)]  # fmt: skip
    return StagePlan({"pretrained": three, "from_scratch": seven}[preset])


def main() -> None:
    """Train in stages, then print the recall on unseen drawings and unseen emoji."""
    parser = argparse.ArgumentParser(description="Train an image-text model in stages.")
    parser.add_argument("--preset", choices=("pretrained", "from_scratch"), default="from_scratch")
    parser.add_argument("--steps", type=int, default=495, help="updates of all stages together")
    parser.add_argument("--weights", type=Path, help="checkpoint to take the towers from")
    parser.add_argument("--run-dir", type=Path, help="run directory; resumes a run that is in it")
    flags = parser.parse_args()
    torch.manual_seed(0)
    model, emoji = FusedTowers(), read_emoji()
    if flags.weights is not None:
        saved = torch.load(flags.weights, map_location="cpu", weights_only=True)["model"]
        model.load_state_dict({**model.state_dict(), **saved})
    hard = HardNegativeLoss(kind="hn_nce", temperature=0.07, learn_temperature=True)
    loss = OneOf(losses={"views": NTXentLoss(), "pairs": CLIPLoss(), "hard": hard})
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], betas=(0.9, 0.98))
    trainer = Trainer(model, loss, optimizer, task=pairs, seed=0)
    plan = plan_of(flags.preset, flags.steps)
    trainer.attach(plan, GradientClipping(max_norm=1.0))
    trainer.attach(*default_handlers(flags.run_dir or new_run("runs", "multistage")))
    print(plan.describe())
    trainer.run(SeededLoader(TrainingPairs(emoji), 256, drop_last=True, collate=with_second_view))
    splits = {"unseen_drawing": unseen_drawings(emoji), "unseen_emoji": unseen_emoji(emoji)}
    metric = RetrievalRecall(k=RANKS)
    evaluator = Evaluator(model, task=pairs, metrics=[metric])
    print(results_table(recall_of(evaluator, metric, splits)))


if __name__ == "__main__":
    main()
