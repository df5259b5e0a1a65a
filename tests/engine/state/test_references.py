"""A second optimizer that a function at an event steps: clipped, guarded, scheduled and saved."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from diptych.engine import SeededLoader, StepEvents, Trainer, TrainStep, tasks
from diptych.engine.state.handler_states import stateful_handlers
from diptych.handlers import CheckpointManager, GradientClipping, LearningRate, LossGuard

Attach = Callable[[Trainer, Optimizer], object]


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random images with labels; one of them may be no number."""

    def __init__(self, bad: int | None = None) -> None:
        self.images = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
        if bad is not None:
            self.images[bad, 0] = float("nan")

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": torch.tensor(index % 2)}


def loader(bad: int | None = None, *, shuffle: bool = True) -> SeededLoader:
    return SeededLoader(Samples(bad), batch_size=4, seed=5, shuffle=shuffle)


def by_function(trainer: Trainer, second: Optimizer) -> None:
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, lambda _: second.step())


def by_object(trainer: Trainer, second: Optimizer) -> None:
    class Second:
        def __init__(self) -> None:
            self.parts = types.SimpleNamespace(optimizer=second)

        def go(self) -> None:
            self.parts.optimizer.step()

    trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, Second().go)


class WithState:
    """The recipe that a user would write: a handler with the state of the optimizer."""

    changes = ("weights",)

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, self.go)

    def go(self, _: Trainer) -> None:
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def by_handler(trainer: Trainer, second: Optimizer) -> None:
    trainer.attach(WithState(second))


class Both(TrainStep):
    """A step of ones own with another optimizer."""

    second: Optimizer

    def update(self) -> None:
        super().update()
        self.second.step()


class Global(TrainStep):
    """A step of ones own with an optimizer of its module."""

    def update(self) -> None:
        super().update()
        SHARED[0].step()


SHARED: list[Optimizer] = []


def test_a_step_may_hold_it():
    for step in (Both, Global):
        trainer, second = make_trainer(None, GradientClipping(max_norm=1e-3), step=step)
        trainer._process_function.second = second
        SHARED[:] = [second]
        trainer.run(loader(), max_iters=1)
        norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-4)
        assert list(stateful_handlers(trainer)) == ["SGD"]
    SHARED.clear()


every_way = pytest.mark.parametrize("attach", [by_function, by_object, by_handler])


def make_trainer(
    attach: Attach | None, *handlers: Any, **settings: Any
) -> tuple[Trainer, Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    settings = {"task": tasks.classification, "device": "cpu", "seed": 2, **settings}
    trainer = Trainer(model, nn.CrossEntropyLoss(), first, **settings)
    trainer.attach(*handlers)
    if attach is not None:
        attach(trainer, second)
    return trainer, second


@every_way
def test_clipping_bounds_the_gradients_of_both_together(attach):
    trainer, _ = make_trainer(attach, GradientClipping(max_norm=1e-3))
    trainer.run(loader(), max_iters=1)
    norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-4)


@every_way
def test_a_batch_that_the_guard_skips_changes_no_weight(attach):
    trainer, _ = make_trainer(attach, LossGuard())
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.run(loader(bad=1, shuffle=False), max_iters=1)
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert trainer.handlers_of(LossGuard)[0].caught == 1


@every_way
def test_a_gradient_that_only_the_second_one_holds_is_judged(attach):
    trainer, _ = make_trainer(attach, LossGuard())

    def spoil(engine: Trainer) -> None:
        engine.model[2].bias.register_hook(lambda gradient: gradient * float("inf"))

    trainer.add_event_handler(Events.STARTED, spoil)
    trainer.run(loader(), max_iters=1)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@every_way
def test_a_schedule_sets_the_rates_of_both(attach):
    trainer, second = make_trainer(attach, LearningRate(warmup=4, decay="constant"))
    data = loader()
    trainer.run(data, max_iters=2)
    assert second.param_groups[0]["lr"] == pytest.approx(0.05)
    trainer.run(data, max_iters=6)
    assert second.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_schedule_leaves_the_rate_to_a_scheduler_of_its_own():
    trainer, second = make_trainer(by_function, LearningRate(warmup=4, decay="constant"))
    scheduler = ExponentialLR(second, 0.5)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, scheduler.step)
    trainer.run(loader(), max_epochs=2)
    assert second.param_groups[0]["lr"] == pytest.approx(0.025)


def managed(attach: Attach, folder: Path) -> tuple[Trainer, Optimizer]:
    handlers = (LearningRate(warmup=2), CheckpointManager(folder, every=5))
    return make_trainer(attach, *handlers)


@every_way
def test_a_resumed_run_has_its_momentum_and_rates(attach, tmp_path):
    whole, _ = managed(attach, tmp_path / "whole")
    whole.run(loader(), max_epochs=3)
    first, _ = managed(attach, tmp_path / "cut")
    first.add_event_handler(Events.ITERATION_COMPLETED(once=8), lambda t: t.terminate())
    first.run(loader(), max_epochs=3)
    again, second = managed(attach, tmp_path / "cut")
    again.run(loader(), max_epochs=3)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key
    assert second.state[again.model[2].weight]["momentum_buffer"].any()
    saved = [key for key in stateful_handlers(again) if key in {"SGD", "WithState"}]
    assert saved == (["WithState"] if attach is by_handler else ["SGD"])


def test_a_rate_that_the_script_has_changed_applies_on_resume(tmp_path, caplog):
    def build(lr: float) -> tuple[Trainer, Optimizer]:
        trainer, second = make_trainer(by_function, CheckpointManager(tmp_path))
        second.param_groups[0]["lr"] = lr
        return trainer, second

    first, second = build(0.1)

    def reduce(_: Trainer) -> None:
        second.param_groups[0]["lr"] = 0.05

    first.add_event_handler(Events.EPOCH_COMPLETED(once=1), reduce)
    first.run(loader(), max_epochs=1)
    trainer, same = build(0.1)
    trainer.run(loader(), max_epochs=2)
    assert same.param_groups[0]["lr"] == 0.05
    trainer, other = build(0.3)
    caplog.clear()
    trainer.run(loader(), max_epochs=3)
    assert other.param_groups[0]["lr"] == pytest.approx(0.15)  # as a function has halved it
    assert "handlers.SGD.groups.0.lr 0.1 -> 0.3" in caplog.text


def test_it_is_found_behind_its_scheduler():
    trainer, second = make_trainer(None)
    scheduler = ExponentialLR(second, 0.5)

    def step(_: Trainer) -> None:
        scheduler.optimizer.step()
        scheduler.step()

    trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, step)
    trainer.run(loader(), max_iters=1)

    assert trainer.optimizers == [trainer.optimizer, second]
    assert {"SGD", "ExponentialLR"} <= set(stateful_handlers(trainer))


def test_it_is_logged_once_and_refused_in_fp16(caplog):
    trainer, _ = make_trainer(by_function)
    trainer.run(loader(), max_epochs=1)
    trainer.run(loader(), max_epochs=2)
    said = [r.getMessage() for r in caplog.records if "another optimizer" in r.getMessage()]
    assert len(said) == 1
    assert "CompositeOptimizer" in said[0]
    trainer, _ = make_trainer(by_function, precision="fp16")
    with pytest.raises(ValueError, match="'fp16' with an optimizer beside the trainer's, got SGD"):
        trainer.run(loader(), max_epochs=1)


def test_an_optimizer_of_other_parameters_does_not_count(caplog):
    trainer, _ = make_trainer(None)
    probe = nn.Linear(2, 2)
    by_function(trainer, torch.optim.SGD(probe.parameters(), lr=1.0))
    trainer.run(loader(), max_epochs=1)
    assert trainer.optimizers == [trainer.optimizer]
    assert not caplog.records
