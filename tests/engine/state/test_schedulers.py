"""Schedulers of torch and Ignite, however they are stepped, continue exactly in a resumed run."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.handlers as ignite_handlers
import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.engine.state.handler_states import stateful_handlers
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager

Make = Callable[[Optimizer], Any]
Attach = Callable[[Trainer, Any], object]


class Decay:
    """A function of the epoch with settings of its own, arrays included."""

    def __init__(self) -> None:
        self.steps = np.array([1.0, 0.9, 0.5])

    def __call__(self, epoch: int) -> float:
        return float(self.steps[epoch % 3])


TORCH: dict[str, Make] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3], gamma=0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.7**epoch),
    "LambdaLR of objects": lambda o: lr_scheduler.LambdaLR(o, Decay()),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 1, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, scale_fn=lambda _: 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.MultiStepLR(o, [2])], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.03, anneal_epochs=4),
}
IGNITE: dict[str, Make] = {
    "CosineAnnealingScheduler": lambda o: ignite_handlers.CosineAnnealingScheduler(
        o, "lr", 0.1, 0.01, 4, cycle_mult=2.0
    ),
    "LinearCyclicalScheduler": lambda o: ignite_handlers.LinearCyclicalScheduler(
        o, "lr", 0.1, 0.01, 6
    ),
    "PiecewiseLinear": lambda o: ignite_handlers.PiecewiseLinear(
        o,
        "lr",
        milestones_values=list(zip(np.arange(3) * 5, np.array([0.1, 0.2, 0.0]), strict=True)),
    ),
    "ConcatScheduler": lambda o: ignite_handlers.ConcatScheduler(
        [
            ignite_handlers.LinearCyclicalScheduler(o, "lr", 0.1, 0.01, 4),
            ignite_handlers.CosineAnnealingScheduler(o, "lr", 0.1, 0.01, 6),
        ],
        durations=[5],
    ),
    "LRScheduler": lambda o: ignite_handlers.LRScheduler(
        lr_scheduler.MultiStepLR(o, [2, 8], gamma=0.5)
    ),
    "create_lr_scheduler_with_warmup": lambda o: ignite_handlers.create_lr_scheduler_with_warmup(
        lr_scheduler.ExponentialLR(o, 0.8), 0.0, 5
    ),
    "ParamGroupScheduler": lambda o: ignite_handlers.ParamGroupScheduler(
        [ignite_handlers.LinearCyclicalScheduler(o, "lr", 0.1, 0.01, 6, param_group_index=0)]
    ),
}


def by_argument(trainer: Trainer, scheduler: Any) -> None:
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda _, given, **named: given.step(), scheduler, unused=1
    )


def by_closure(trainer: Trainer, scheduler: Any) -> None:
    @trainer.on(Events.EPOCH_COMPLETED)
    def step_it() -> None:
        def inner() -> None:
            scheduler.step()

        inner()


def by_default(trainer: Trainer, scheduler: Any) -> None:
    def step_it(*, held: list[Any] = [scheduler]) -> None:  # noqa: B006 - never changed
        held[0].step()

    trainer.add_event_handler(Events.EPOCH_COMPLETED, step_it)


def by_attribute(trainer: Trainer, scheduler: Any) -> None:
    parts = types.SimpleNamespace(rates={"first": scheduler})

    class Steps:
        def __init__(self) -> None:
            self.parts = parts

        def go(self, _: Trainer) -> None:
            self.parts.rates["first"].step()

    trainer.add_event_handler(Events.EPOCH_COMPLETED, Steps().go)


def by_partial(trainer: Trainer, scheduler: Any) -> None:
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, functools.partial(lambda parts, _: parts[0].step(), (scheduler,))
    )


def by_trainer(trainer: Trainer, scheduler: Any) -> None:
    trainer.scheduler = scheduler  # type: ignore[attr-defined]
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda t: t.scheduler.step())


def by_global(trainer: Trainer, scheduler: Any) -> None:
    space: dict[str, Any] = {"scheduler": scheduler}
    exec("def step_it(trainer):\n    scheduler.step()", space)  # noqa: S102 - a script's globals
    trainer.add_event_handler(Events.EPOCH_COMPLETED, space["step_it"])


def by_method(trainer: Trainer, scheduler: Any) -> None:
    trainer.add_event_handler(Events.EPOCH_COMPLETED, scheduler.step)


WAYS: dict[str, Attach] = {
    name.removeprefix("by_"): way
    for name, way in sorted(globals().items())
    if name.startswith("by_")
}


def as_handler(trainer: Trainer, scheduler: Any) -> None:
    trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)


def in_function(trainer: Trainer, scheduler: Any) -> None:
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda t: [scheduler(t)])


def by_its_metric(trainer: Trainer, scheduler: Any) -> None:
    @trainer.on(Events.EPOCH_COMPLETED)
    def judge(engine: Trainer) -> None:
        scheduler.step(engine.state.metrics["train/loss"])


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random images whose labels cannot be learned, so that a plateau comes early."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(12, 3, generator=generator)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": torch.tensor(index % 2)}


class KilledError(Exception):
    """Ends a run without any of the handlers of its end."""


def run(
    make: Make, attach: Attach, folder: Path, killed_at: int | None = None
) -> tuple[list[float], Trainer]:
    """Train for five epochs of four iterations; return the rates of the updates."""
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(
        model, nn.CrossEntropyLoss(), optimizer, task=tasks.classification, device="cpu", seed=2
    )
    attach(trainer, make(optimizer))
    trainer.attach(CheckpointManager(folder, every=3))
    rates: list[float] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Trainer) -> None:
        if engine.state.iteration == killed_at:
            raise KilledError
        rates.append(float(optimizer.param_groups[0]["lr"]))

    try:
        trainer.run(SeededLoader(Samples(), batch_size=3, seed=4), max_epochs=5)
    except KilledError:
        return rates, trainer
    return rates, trainer


def reports(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage() for record in caplog.records]
    return [message for message in said if "do not hold" in message]


def assert_cut_equals_uncut(make: Make, attach: Attach, folder: Path, at: int) -> None:
    whole, uncut = run(make, attach, folder / "whole")
    before, _ = run(make, attach, folder / "cut", killed_at=at)
    after, resumed = run(make, attach, folder / "cut")
    saved = (at - 1) // 3 * 3
    assert before[:saved] + after == whole
    assert len(set(whole)) > 2, "the schedule must do something"
    for key, value in uncut.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)


@pytest.mark.parametrize("name", TORCH)
def test_a_torch_scheduler_continues_exactly(name, tmp_path):
    assert_cut_equals_uncut(TORCH[name], by_method, tmp_path, 11)


@pytest.mark.parametrize("way", WAYS)
def test_a_torch_scheduler_is_saved_however_a_function_reaches_it(way, tmp_path, caplog):
    assert_cut_equals_uncut(TORCH["SequentialLR"], WAYS[way], tmp_path, 11)
    assert not reports(caplog)


@pytest.mark.parametrize("attach", [as_handler, in_function])
@pytest.mark.parametrize("name", IGNITE)
def test_a_scheduler_of_ignite_continues_exactly(name, attach, tmp_path):
    assert_cut_equals_uncut(IGNITE[name], attach, tmp_path, 11)


@pytest.mark.parametrize("at", [8, 17])
def test_a_plateau_scheduler_that_a_function_steps_continues_exactly(at, tmp_path):
    def make(optimizer: Optimizer) -> Any:
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.1)

    assert_cut_equals_uncut(make, by_its_metric, tmp_path, at)


@pytest.mark.parametrize("at", [8, 17])
def test_a_plateau_scheduler_of_ignite_continues_exactly(at, tmp_path):
    def make(optimizer: Optimizer) -> Any:
        return ignite_handlers.ReduceLROnPlateauScheduler(
            optimizer, "train/loss", factor=0.5, patience=0, threshold=0.1, save_history=True
        )

    def attach(trainer: Trainer, scheduler: Any) -> None:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, scheduler)

    assert_cut_equals_uncut(make, attach, tmp_path, at)


def test_a_scheduler_has_one_key_however_it_is_reached(tmp_path):
    keys = {
        way: list(stateful_handlers(run(TORCH["StepLR"], attach, tmp_path / way)[1]))
        for way, attach in WAYS.items()
    }
    assert {tuple(found) for found in keys.values()} == {("CheckpointManager", "StepLR")}


def test_a_scheduler_of_another_optimizer_is_not_saved(tmp_path):
    def attach(trainer: Trainer, _: Any) -> None:
        other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = lr_scheduler.StepLR(other, 1)
        other.step()  # torch warns otherwise
        by_closure(trainer, scheduler)

    _, trainer = run(TORCH["StepLR"], attach, tmp_path)
    assert "StepLR" not in stateful_handlers(trainer)


class Hidden:
    """Reaches a scheduler in a way that no search can follow."""

    kept: dict[int, Any] = {}  # noqa: RUF012 - of the class

    def __getattr__(self, name: str) -> Any:
        return Hidden.kept[0]


def test_a_scheduler_that_cannot_be_found_is_reported_at_the_first_save(tmp_path, caplog):
    hidden = Hidden()

    def attach(trainer: Trainer, scheduler: Any) -> None:
        Hidden.kept[0] = scheduler
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: [hidden.rates.step()])

    _, trainer = run(TORCH["StepLR"], attach, tmp_path)
    said = [
        record.getMessage() for record in caplog.records if "lack the state" in record.getMessage()
    ]
    assert len(said) == 1
    assert "StepLR" in said[0]
    assert "StepLR" not in stateful_handlers(trainer)
    Hidden.kept.clear()
