"""Trainings to certify: sound ones, and such in which something is planted."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from diptych.engine import SeededLoader, StepEvents, Trainer, tasks
from diptych.losses import CLIPLoss, CrossEntropyLoss


class Towers(nn.Module):
    """Two small towers; the first may hold a batch norm or a dropout."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 5), middle or nn.Tanh(), nn.Linear(5, 3))
        self.text = nn.Linear(4, 3)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


class LocalLoss(nn.Module):
    """A contrastive loss that knows its own rank's samples only."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        logits = 5 * F.normalize(first) @ F.normalize(second).T
        return F.cross_entropy(logits, torch.arange(len(logits)))


class MultipliedLoss(CLIPLoss):
    """A loss times the number of ranks."""

    def terms(self, first: Tensor, second: Tensor, groups: Any = None) -> dict[str, Tensor]:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return {name: term * ranks for name, term in super().terms(first, second, groups).items()}


class DenyingLoss(CLIPLoss):
    """A loss that couples the samples of a batch and denies it."""

    couples_samples = False

    def total_and_weight(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self(first, second) * len(first), torch.tensor(float(len(first)))


def pairs(samples: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "image": torch.randn(samples, 6, generator=generator),
        "text": torch.randn(samples, 4, generator=generator),
    }


def with_draws() -> dict[str, Tensor]:
    """Return pairs with a number between 0 and 1 for each, drawn as a data set would."""
    generator = torch.Generator().manual_seed(5)
    return {**pairs(), "draws": torch.rand(9, generator=generator)}


def apply_draws(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shift each image by the number that was drawn for it."""
    return {
        "image": batch["image"].float() + batch["draws"][:, None].float(),
        "text": batch["text"],
    }


def add_noise(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draw for the batch at once."""
    return {**batch, "image": batch["image"] + torch.randn_like(batch["image"])}


def centre(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mix the samples of a batch."""
    return {**batch, "image": batch["image"] - batch["image"].mean(0)}


def labelled(samples: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "image": torch.randn(samples, 6, generator=generator),
        "label": torch.arange(samples) % 3,
    }


def trainer_of(
    middle: nn.Module | None = None, loss: nn.Module | None = None, **options: Any
) -> Trainer:
    torch.manual_seed(1)
    return _trainer(Towers(middle), loss or CLIPLoss(), tasks.image_text, **options)


def classifier(loss: nn.Module) -> Trainer:
    torch.manual_seed(1)
    return _trainer(nn.Linear(6, 3), loss, tasks.classification)


def _trainer(model: nn.Module, loss: nn.Module, task: Any, **options: Any) -> Trainer:
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1, momentum=0.9)
    return Trainer(model, loss, optimizer, task=task, device="cpu", **options)


def build() -> tuple[Trainer, list[dict[str, Tensor]]]:
    """Return a sound training and its loader, for the command."""
    return trainer_of(), [pairs()] * 3


def build_with_batch_norm() -> tuple[Trainer, list[dict[str, Tensor]]]:
    """Return a training in which batch norm is planted, for the command."""
    return trainer_of(nn.BatchNorm1d(5)), [pairs()] * 3


class Meddler:
    """Changes a weight when it should only look."""

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, self.meddle)

    def meddle(self, trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.model.text.bias.add_(1e-3)


def build_with_faults() -> tuple[Trainer, list[dict[str, Tensor]]]:
    """Return a training with a factor of the ranks and a handler that changes a weight."""
    trainer = trainer_of(loss=MultipliedLoss()).attach(Meddler())
    return trainer, [pairs()] * 3


class Pairs(Dataset[dict[str, Tensor]]):
    """A few pairs, one at a time."""

    def __len__(self) -> int:
        return 18

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in pairs(18).items()}


def build_with_torch_loader() -> tuple[Trainer, DataLoader[dict[str, Tensor]]]:
    """Return a sound training whose loader cannot go to a position inside an epoch."""
    return trainer_of(), DataLoader(Pairs(), batch_size=6)


def build_with_seeded_loader() -> tuple[Trainer, SeededLoader]:
    """Return a sound training whose loader has positions, for the command."""
    return trainer_of(), SeededLoader(Pairs(), batch_size=6, seed=0)


ACROSS_RANKS = {
    "sound": lambda: (trainer_of(), pairs()),
    "batch norm": lambda: (trainer_of(nn.BatchNorm1d(5)), pairs()),
    "local": lambda: (trainer_of(loss=LocalLoss()), pairs()),
    "multiplied": lambda: (trainer_of(loss=MultipliedLoss()), pairs()),
    "transform": lambda: (trainer_of(transform=apply_draws), with_draws()),
    "noise": lambda: (trainer_of(transform=add_noise), pairs()),
    "centred": lambda: (trainer_of(nn.BatchNorm1d(5), transform=centre), pairs()),
    "mean over samples": lambda: (classifier(nn.CrossEntropyLoss()), labelled()),
    "global mean": lambda: (classifier(CrossEntropyLoss()), labelled()),
}
