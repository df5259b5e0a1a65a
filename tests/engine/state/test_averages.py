"""torch's averages of weights that a function at an event updates are saved with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diptych.engine import SeededLoader, StepEvents, Trainer, tasks
from diptych.handlers import CheckpointManager
from diptych.losses import CrossEntropyLoss

BATCHES = 4
Attach = Callable[[Trainer, AveragedModel], object]


def by_closure(trainer: Trainer, average: AveragedModel) -> None:
    def update() -> None:
        average.update_parameters(trainer.model)

    trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, update)


def by_trainer(trainer: Trainer, average: AveragedModel) -> None:
    def update(trainer: Trainer) -> None:
        trainer.average.update_parameters(trainer.model)

    trainer.average = average
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, update)


def by_object(trainer: Trainer, average: AveragedModel) -> None:
    class Averaging:
        def __init__(self) -> None:
            self.parts = {"ema": average}

        def attach(self, trainer: Trainer) -> None:
            trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, self.update)

        def update(self, trainer: Trainer) -> None:
            self.parts["ema"].update_parameters(trainer.model)

    trainer.attach(Averaging())


def run(folder: Path, attach: Attach, stop: int | None = None) -> AveragedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, CrossEntropyLoss(), optimizer, task=tasks.classification, seed=0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    attach(trainer, average)
    trainer.attach(CheckpointManager(folder, every=1))
    if stop is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), lambda t: t.terminate())
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 3, generator=generator)
    data = torch.utils.data.TensorDataset(images, torch.arange(16) % 2)
    trainer.run(SeededLoader(data, batch_size=16 // BATCHES), max_epochs=2)
    return average


@pytest.mark.parametrize("attach", [by_closure, by_trainer, by_object])
def test_an_average_of_torch_continues_exactly_after_a_resume(attach: Attach, tmp_path: Path):
    whole = run(tmp_path / "whole", attach).state_dict()
    run(tmp_path / "cut", attach, stop=BATCHES + 1)
    resumed = run(tmp_path / "cut", attach).state_dict()

    assert whole["n_averaged"] == 2 * BATCHES
    assert all(value.equal(resumed[key]) for key, value in whole.items())
