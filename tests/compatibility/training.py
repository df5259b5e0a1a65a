"""The training whose checkpoints are stored beside this file, and the command that stored them.

`python -m tests.compatibility.training FOLDER` runs it to the middle of an epoch and leaves the
run's directory in FOLDER, with the weights of the run that nobody interrupted. A new format of
checkpoints gets a folder of its own, `format_<number>`, made by the first commit that writes it;
the stored ones stay as they are. For an older format, check its commit out into another folder and
run the command there with PYTHONPATH=<folder>/face/uninstalled:<folder>; commit 1ce2fac wrote
format 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from ignite.engine import Events

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import (
    CheckpointManager,
    EarlyStopping,
    Evaluation,
    GradientClipping,
    JsonLines,
    LearningRate,
    RetrievalRecall,
    WeightAverage,
)
from diptych.losses import MoCoLoss

EPOCHS, STOP = 3, 7


class TwoTowers(torch.nn.Module):
    """Two small towers, one of them with a dropout and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2)
        )
        self.text = torch.nn.Linear(5, 8)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features of both sides."""
        return self.image(image), self.text(text)


def build(folder: Path) -> tuple[Trainer, SeededLoader]:
    """Return a trainer with handlers that keep a state, and its loader."""
    torch.manual_seed(0)
    pairs = [
        {"image": torch.randn(6), "text": torch.randn(5), "group": index} for index in range(20)
    ]
    model, loss = TwoTowers(), MoCoLoss(dim=8, queue_size=16)
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=1e-2)
    trainer = Trainer(
        model, loss, optimizer, task=tasks.image_text, seed=3, log_every=2, device="cpu"
    )
    held_out = SeededLoader(pairs, batch_size=10, shuffle=False)
    trainer.attach(
        LearningRate(warmup=2, decay="cosine"),
        GradientClipping(max_norm=1.0),
        WeightAverage(),
        Evaluation(held_out, metrics=[RetrievalRecall(k=(1, 5))]),
        EarlyStopping(metric="val/recall@1", patience=5),
        CheckpointManager(folder, every=1, keep=1, best="val/recall@1"),
        JsonLines(folder / "metrics.jsonl"),
    )
    return trainer, SeededLoader(pairs, batch_size=4)


def run_to_the_stop(folder: Path) -> None:
    """Write the directory of a run that stops inside its second epoch."""
    trainer, loader = build(folder)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=STOP), lambda t: t.terminate())
    trainer.run(loader, max_epochs=EPOCHS)


def store(folder: Path) -> None:
    """Write the directory of a run that stops inside its second epoch, and the whole run's end.

    Args:
        folder: empty, or not there yet.
    """
    run_to_the_stop(folder)
    with TemporaryDirectory() as elsewhere:
        whole, loader = build(Path(elsewhere))
        whole.run(loader, max_epochs=EPOCHS)
    torch.save(whole.model.state_dict(), folder / "end.pt")
    (folder / "run.lock").unlink(missing_ok=True)


if __name__ == "__main__":
    # Imported again, so that the run's identity names this module and not `__main__`.
    from tests.compatibility import training

    training.store(Path(sys.argv[1]))
