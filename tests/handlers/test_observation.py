"""All handlers that only report, attached together at their default cadence, change no bit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from diptych.engine import Trainer, tasks
from diptych.handlers import (
    Evaluation,
    GradientDiagnostics,
    HistoryPlots,
    InBatchAccuracy,
    LossGuard,
    RepresentationHealth,
    RetrievalRecall,
    default_handlers,
)
from diptych.losses import CLIPLoss


class Towers(nn.Module):
    """Two towers with layers that an extra forward pass would change: dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)
        )
        self.text = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(24, 4))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


def batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randn(16, 6, generator=generator),
            "text": torch.randint(20, (16, 3), generator=generator),
            "group": torch.randint(12, (16,), generator=generator),
        }
        for _ in range(count)
    ]


def weights(folder: Path | None) -> list[Tensor]:
    torch.manual_seed(0)
    model, loss = Towers(), CLIPLoss()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=1e-2)
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text, seed=1, device="cpu")
    if folder is not None:
        trainer.attach(
            LossGuard(),
            RepresentationHealth(),
            GradientDiagnostics(),
            InBatchAccuracy(),
            Evaluation(batches(2, seed=9), metrics=[RetrievalRecall(k=(1,))], at_start=True),
            HistoryPlots(folder),
            *default_handlers(folder, best="val/recall@1"),
        )
    trainer.run(batches(60, seed=3), max_epochs=2)
    parts = (model.state_dict(), loss.state_dict())
    return [value for part in parts for value in part.values()]


def test_all_diagnostics_together_leave_the_weights_of_the_bare_run(tmp_path):
    bare, watched = weights(None), weights(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
