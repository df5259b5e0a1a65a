"""Small runs for the tests of sinks: a trainer, a loader with a position, a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.utils.data import Dataset

from diptych.engine import MetricsEvents, SeededLoader, Trainer, tasks
from diptych.engine.metrics.metrics_collector import Record
from diptych.handlers import HistoryPlots, JsonLines, RunRecord

EPOCH_LENGTH = 6


class Squares(Dataset[dict[str, Tensor]]):
    """Eleven samples: six batches of two, of which the last is smaller."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": torch.full((3,), index / 11), "label": torch.tensor(index % 2)}


def loader() -> SeededLoader:
    """Return a loader of six batches."""
    return SeededLoader(Squares(), 2, seed=3)


def classifier(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> Trainer:
    """Return a trainer of a model that classifies, on the CPU."""
    settings = {"device": "cpu", **settings}
    loss = nn.CrossEntropyLoss()
    return Trainer(model, loss, optimizer, task=tasks.classification, **settings)


def make_trainer(*, log_every: int = 4, **settings: Any) -> Trainer:
    """Return a trainer that logs at every fourth iteration and at the end of each epoch."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return classifier(model, optimizer, log_every=log_every, seed=5, **settings)


def report_each_epoch(trainer: Trainer, *values: float, tag: str = "val/recall@1") -> None:
    """Report the next of the values at the end of each epoch."""
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda: trainer.metrics.report(
            trainer.state.iteration, {tag: values[trainer.state.epoch - 1]}
        ),
    )


def reported_run(folder: Path, epochs: int = 2, **settings: Any) -> Path:
    """Train with a report in a folder, and return the folder."""
    trainer = make_trainer(**settings)
    report_each_epoch(trainer, 0.25, 0.75, 0.5)
    trainer.attach(RunRecord(folder), JsonLines(folder), HistoryPlots(folder))
    trainer.run(loader(), max_epochs=epochs)
    return folder


def kept_records(trainer: Trainer) -> list[Record]:
    """Return a list to which each of the trainer's records is added."""
    records: list[Record] = []
    trainer.add_event_handler(MetricsEvents.LOGGED, lambda: records.append(trainer.metrics.record))
    return records


class Stop(BaseException):
    """Imitates the end of the process."""


def stop_at(trainer: Trainer, iteration: int) -> None:
    """End the run in the middle of an iteration, as a kill would; a later run goes on."""
    stopped: list[int] = []

    def stop() -> None:
        if trainer.state.iteration == iteration and not stopped:
            stopped.append(iteration)
            raise Stop

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True
