"""Runs in stages for tests of plans: a small encoder, a loader, evaluations with given values."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import Evaluation, Stage, StagePlan
from diptych.losses import CrossEntropyLoss


class Squares(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, samples: int = 20) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = torch.randn(3, generator=torch.Generator().manual_seed(index))
        return {"image": image, "label": torch.tensor(index % 2)}


class Encoder(nn.Module):
    """A stem with a batch norm, two blocks, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)))
        self.plain = nn.BatchNorm1d(6, affine=False)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.plain(self.blocks(self.stem(x)))))


def loader(samples: int = 20) -> SeededLoader:
    """Return five batches of four."""
    return SeededLoader(Squares(samples), 4)


def make_trainer(*stages: Stage, loss: nn.Module | None = None, attach: bool = True) -> Trainer:
    torch.manual_seed(0)
    model, loss = Encoder(), CrossEntropyLoss() if loss is None else loss
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=1.0)
    trainer = Trainer(
        model, loss, optimizer, task=tasks.classification, device="cpu", seed=0, log_every=2
    )
    return trainer.attach(StagePlan(stages)) if attach else trainer


def plan_of(trainer: Trainer) -> StagePlan:
    (plan,) = trainer.handlers_of(StagePlan)
    return plan


def rates_of(trainer: Trainer) -> dict[str, float]:
    """Return the current rate of every parameter."""
    rates = {id(p): g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    return {name: rates.get(id(p), 0.0) for name, p in trainer.model.named_parameters()}


def noted(trainer: Trainer, read: Any, event: Any = Events.ITERATION_COMPLETED) -> list[Any]:
    """Return a list of what `read` returns at each event, filled during the run."""
    values: list[Any] = []
    trainer.add_event_handler(event, lambda: values.append(read()))
    return values


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


HEAD = Stage("head", trains="head", epochs=1, lr=0.1)
ALL = Stage("all", epochs=2, lr=0.01)


def evaluated(trainer: Trainer, values: list[float], every: int | str = "epoch") -> Trainer:
    """Attach an evaluation whose metric has these values."""
    evaluation = Evaluation(list(loader()), every=every, loss=False)
    trainer.attach(evaluation)
    left = iter(values)
    evaluation.evaluator.add_event_handler(
        Events.COMPLETED, lambda engine: engine.state.metrics.update(recall=next(left))
    )
    evaluation.evaluator._metrics["recall"] = None
    return trainer
