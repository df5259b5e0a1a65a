"""A training script in which a test changes something, and the states that it saves."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from diptych.engine import RunEvents, SeededLoader, Trainer, tasks
from diptych.engine.state.run_state import load_run_state, run_state
from diptych.losses import CrossEntropyLoss

EPOCH = 4
SGD = torch.optim.SGD


def data_set(samples: int = 32, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 8, generator=generator)
    return TensorDataset(inputs, torch.randint(4, (samples,), generator=generator))


def halve_after(epochs: int) -> Callable[[Trainer], None]:
    def halve(trainer: Trainer) -> None:
        if trainer.state.epoch > epochs:
            trainer.optimizer.param_groups[0]["lr"] /= 2

    return halve


def shifted_by(distance: float) -> Callable[[Any], Any]:
    return lambda batch: [batch[0] + distance, batch[1]]


@attrs.define(kw_only=True)
class Script:
    """A training script, in which each test changes something."""

    width: int = 16
    activation: Callable[[], nn.Module] = nn.ReLU
    dropout: float = 0.0
    frozen: tuple[str, ...] = ()
    evaluating: tuple[int, ...] = ()
    optimizer: Callable[..., torch.optim.Optimizer] = SGD
    options: dict[str, Any] = attrs.field(factory=dict)
    groups: int = 1
    rate: float = 0.1
    scheduler: Callable[..., Any] | None = None
    handlers: tuple[Any, ...] = ()
    function: Callable[[Trainer], None] | None = None
    transform: Any = None
    arguments: dict[str, Any] = attrs.field(factory=dict)
    loader: dict[str, Any] = attrs.field(factory=dict)
    samples: int = 32
    data_seed: int = 0

    def build(self) -> Trainer:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(8, self.width),
            nn.BatchNorm1d(self.width),
            self.activation(),
            nn.Dropout(self.dropout),
            nn.Linear(self.width, 4),
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        for index in self.evaluating:
            model[index].eval()
        parts = [model] if self.groups == 1 else [model[:3], model[3:]]
        groups = [{"params": list(part.parameters()), "lr": self.rate} for part in parts]
        optimizer = self.optimizer(groups, **self.options)
        trainer = Trainer(
            model,
            CrossEntropyLoss(),
            optimizer,
            task=tasks.classification,
            transform=self.transform,
            **{"seed": 0, "log_every": 50, "device": "cpu", **self.arguments},
        )
        if self.scheduler is not None:
            scheduler = self.scheduler(optimizer)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, scheduler.step)
        trainer.attach(*(copy.deepcopy(handler) for handler in self.handlers))
        if self.function is not None:
            trainer.add_event_handler(Events.EPOCH_STARTED, self.function)
        return trainer

    def data(self) -> SeededLoader:
        settings = {"batch_size": 32 // EPOCH, **self.loader}
        return SeededLoader(data_set(self.samples, self.data_seed), **settings)


def saved_by(script: Script, at: int = EPOCH) -> dict[str, Any]:
    """Run two epochs of a script, and return the state after an iteration."""
    trainer = script.build()
    found: list[bytes] = []

    def save(trainer: Trainer) -> None:
        file = io.BytesIO()
        torch.save(run_state(trainer), file)
        found.append(file.getvalue())

    trainer.add_event_handler(RunEvents.SAFE_POINT(once=at), save)
    trainer.run(script.data(), max_epochs=2)
    return torch.load(io.BytesIO(found[-1]), weights_only=True)


def resumed(script: Script, state: dict[str, Any], changes: Any = "apply") -> Trainer:
    """Build a script, and load a state as its run starts; stop before the first iteration."""
    trainer = script.build()

    def load(trainer: Trainer) -> None:
        load_run_state(trainer, state, changes)

    trainer.add_event_handler(RunEvents.RESTORE, load)
    trainer.add_event_handler(Events.STARTED, lambda trainer: trainer.terminate())
    trainer.run(script.data(), max_epochs=2)
    return trainer


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if "engine.state" in r.name and r.levelno >= level
    ]


def group(trainer: Trainer) -> dict[str, Any]:
    return trainer.optimizer.param_groups[0]


def scripts_of(**changed: Any) -> tuple[Script, Script]:
    """Return two scripts, whose values of each argument are the pair that is given."""
    return tuple(Script(**{k: pair[i] for k, pair in changed.items()}) for i in (0, 1))  # type: ignore[return-value]


def step(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def identical(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(identical(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(identical, first, second))
    return first.equal(second) if isinstance(first, Tensor) else first == second


def freeze(trainer: Trainer) -> None:
    trainer.model[0].requires_grad_(False)
    trainer.model[1].eval()
    trainer.model[3].p = 0.25
