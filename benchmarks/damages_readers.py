"""Damages to the files that reports, `diptych compare` and `diptych replay` read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import LossGuard, Throughput, default_handlers
from diptych.handlers.loss_guard.fault_records import read_record
from diptych.handlers.reports.page import page
from diptych.handlers.reports.run_history import read_run
from diptych.losses import CrossEntropyLoss

READ = ("metrics", "settings", "identity", "events", "report", "iteration_")
"""Beginnings of the names of the files that are damaged; those of checkpoints have their own."""


class Samples(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Sixty-four samples, of which one is not finite."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(64, 8, generator=generator)
        self.labels = torch.randint(4, (64,), generator=generator)
        self.images[40, 3] = torch.nan

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


def complete(directory: Path) -> None:
    """Train with the default handlers and a guard, which catches a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    trainer = Trainer(
        model,
        CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        task=tasks.classification,
        seed=0,
        log_every=1,
        device="cpu",
    )
    written = [h for h in default_handlers(directory) if type(h).__name__ not in SHOWN]
    guard = LossGuard(directory / "caught", records=1)
    trainer.attach(guard, Throughput(), *written)
    trainer.run(SeededLoader(Samples(), 16, seed=0), max_epochs=6)


SHOWN = ("ProgressBar", "RunCard", "Throughput")


def read_everything(directory: Path) -> dict[str, str]:
    """Return digests of what the readers find: a report of the run, and the caught batch."""
    report = page([attrs.evolve(read_run(directory), name="a run")])
    (caught,) = (directory / "caught").iterdir()
    record = hashlib.sha256(repr(_plain(read_record(caught))).encode()).hexdigest()
    return {"report": hashlib.sha256(report.encode()).hexdigest(), "record": record}


def _plain(value: Any) -> Any:
    """Return a value with tensors as bytes."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return [(key, _plain(item)) for key, item in value.items()]
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
