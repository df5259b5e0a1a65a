"""Quickstart: the example of the README, on the emoji that ship with the repository.

Usage: python -m examples.quickstart
"""

import torch

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import (
    Evaluation,
    GradientClipping,
    LearningRate,
    RetrievalRecall,
    default_handlers,
    new_run,
)
from diptych.losses import CLIPLoss
from examples.emoji.data import TrainingPairs, collate, read_emoji
from examples.emoji.model import TwoTowers

EPOCHS = 5  # 30 updates: more than the warm-up


def main(epochs: int = EPOCHS, root: str = "runs") -> Trainer:
    """Train for a few epochs and return the trainer."""
    torch.manual_seed(0)
    emoji = read_emoji()
    unseen = emoji[::10]
    seen = [one for index, one in enumerate(emoji) if index % 10]
    loader = SeededLoader(TrainingPairs(seen), batch_size=512, seed=0, collate=collate)
    held_out = SeededLoader(TrainingPairs(unseen), batch_size=512, shuffle=False, collate=collate)
    # README: begin
    model, loss = TwoTowers(), CLIPLoss()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=2e-3)
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text, microbatch_size=256)
    trainer.attach(
        LearningRate(warmup=20, decay="cosine"),
        GradientClipping(max_norm=1.0),
        Evaluation(held_out, metrics=[RetrievalRecall(k=(1, 5, 10))]),
        *default_handlers(new_run(root, "quickstart"), best="val/recall@1"),
    )
    trainer.run(loader, max_epochs=epochs)
    # README: end
    return trainer


if __name__ == "__main__":
    main()
