"""A small run with bad batches, for the tests of LossGuard and of `diptych replay`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import LossGuard

BATCHES, SIZE = 8, 6
BAD = 4
"""The iteration with the bad batch."""

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
}


class Towers(nn.Module):
    """Has a batch norm, whose statistics a bad batch would pollute, and a random dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3))
        self.text = nn.Linear(5, 5)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


class Distance(nn.Module):
    """A loss with a parameter, two terms and a buffer of features."""

    couples_samples = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("seen", torch.zeros(5))

    def terms(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        self.seen = image.detach().mean(0)  # replaced, not filled
        return {
            "near": (image - text).square().mean(),
            "size": self.weight.square() * text.square().mean(),
        }


def batches(fault: str | None = "nan", at: Iterable[int] = (BAD,)) -> list[dict[str, Tensor]]:
    """Return batches; those at some iterations (from 1) have a fault: "nan" or "spike"."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for iteration in range(1, BATCHES + 1):
        image = torch.randn(SIZE, 4, generator=generator)
        text = torch.randn(SIZE, 5, generator=generator)
        if fault == "nan" and iteration in at:
            image[0, 0] = math.nan
        if fault == "spike" and iteration in at:
            text *= 1e3
        found.append({"image": image, "text": text, "id": torch.arange(SIZE) + 10 * iteration})
    return found


def make_trainer(optimizer: str = "adamw", **settings: Any) -> Trainer:
    """Return the run's trainer without handlers."""
    torch.manual_seed(1)
    model, loss = Towers(), Distance()
    return Trainer(
        model,
        loss,
        OPTIMIZERS[optimizer]([*model.parameters(), *loss.parameters()]),
        task=tasks.image_text,
        **{"device": "cpu", "log_every": 3, "seed": 3, **settings},
    )


def factory() -> tuple[Trainer, list[dict[str, Tensor]]]:
    """Build the run as a user's script does."""
    return make_trainer(), batches()


def other_factory() -> Trainer:
    """Build the run with a loss whose terms are twice as large."""
    trainer = make_trainer()
    size = trainer.loss.terms

    def doubled(image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {name: 2 * term for name, term in size(image, text).items()}

    trainer.loss.terms = doubled  # type: ignore[method-assign]
    return trainer


def caught(folder: Path, fault: str = "nan", **settings: Any) -> Path:
    """Train until a batch is caught, and return the record."""
    trainer = make_trainer(**settings).attach(LossGuard(folder / "caught", window=3))
    trainer.run(batches(fault), max_epochs=1)
    [path] = (folder / "caught").iterdir()
    return path


def seeded_loader() -> SeededLoader:
    """Return a loader with positions, whose batches have no ids."""
    samples = [
        {"image": image, "text": text}
        for batch in batches()
        for image, text in zip(batch["image"], batch["text"], strict=True)
    ]
    return SeededLoader(samples, SIZE, seed=4)  # type: ignore[arg-type]


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of weights, buffers and the optimizer's state."""
    parts = {"model": trainer.model.state_dict(), "loss": trainer.loss.state_dict()}
    found = {f"{k}.{name}": v.clone() for k, state in parts.items() for name, v in state.items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"{index}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    return found
