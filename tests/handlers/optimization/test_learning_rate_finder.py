"""find_learning_rate: its suggestion, the settings it trains with, and what it restores."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import nn

from diptych.engine import (
    CompositeOptimizer,
    SeededLoader,
    StepEvents,
    Trainer,
    TrainStep,
    tasks,
)
from diptych.handlers import GradientClipping, find_learning_rate
from tests.handlers.runs import Squares, kept_records, loader, make_trainer


def bowl(curvature: float) -> Trainer:
    """Return a trainer of one weight w under plain descent, with loss curvature * w ** 2 / 2."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)

    class Half(nn.Module):
        def forward(self, prediction: torch.Tensor) -> torch.Tensor:
            return curvature * prediction.square().mean() / 2

    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)

    def task(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"prediction": model(batch["x"])}

    return Trainer(model, Half(), optimizer, task=task, device="cpu")


def classifier(**settings: Any) -> Trainer:
    """Return a trainer whose optimizer has two groups with different rates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [
        {"params": part.parameters(), "lr": lr} for part, lr in zip(model, (1, 2), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, task=tasks.classification, **settings)


ONES = [{"x": torch.ones(2, 1)}]


@pytest.mark.parametrize("curvature", [1.0, 1000.0])
def test_the_suggestion_is_below_the_rate_at_which_descent_diverges(curvature):
    curve = find_learning_rate(
        bowl(curvature), ONES, start=1e-4 / curvature, end=100 / curvature, steps=100
    )

    # w shrinks by |1 - rate * curvature| at each step: it grows from a rate of 2 / curvature on.
    assert curve.suggestion is not None
    assert 0.005 < curve.suggestion * curvature < 2


def test_the_rates_rise_by_a_constant_factor_from_start_to_end():
    curve = find_learning_rate(bowl(1e-6), ONES, start=1e-3, end=1.0, steps=30)

    ratios = [b / a for a, b in zip(curve.rates, curve.rates[1:], strict=False)]
    assert (curve.rates[0], curve.rates[-1]) == pytest.approx((1e-3, 1.0))
    assert len(curve.rates) == 30
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-3)


def test_a_loss_that_never_falls_gives_no_suggestion():
    trainer = bowl(1.0)
    trainer.model.weight.data.zero_()

    assert find_learning_rate(trainer, ONES, steps=5).suggestion is None


def test_a_search_does_not_change_the_trainer_or_the_run_after_it():
    plain, searched = make_trainer(), make_trainer()
    records = kept_records(searched)
    searched.attach(GradientClipping(max_norm=1.0))
    plain.attach(GradientClipping(max_norm=1.0))
    model, optimizer = copy.deepcopy([searched.model.state_dict(), searched.optimizer.state_dict()])
    data = loader()
    state = torch.get_rng_state()

    find_learning_rate(searched, data, steps=10)

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(model[k], v) for k, v in searched.model.state_dict().items())
    assert searched.optimizer.state_dict() == optimizer
    assert (records, searched.state.iteration) == ([], 0)
    plain.run(loader(), max_epochs=2)
    searched.run(data, max_epochs=2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.model.parameters(), searched.model.parameters(), strict=True)
    )


def test_a_search_trains_with_every_setting_of_the_trainer(monkeypatch):
    settings = {
        "precision": "bf16",
        "microbatch_size": 2,
        "device": torch.device("cpu"),
        "prefetch": False,
        "compile": False,
        "seed": 11,
        "log_every": 7,
        "shard": ("0",),
        "transform": lambda batch: batch,
        "step": TrainStep,
    }
    trainer = classifier(**settings)
    used: list[dict[str, Any]] = []
    run = Trainer.run

    def noted(self: Trainer, *arguments: Any, **named: Any) -> Any:
        used.append(self.arguments)
        return run(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "run", noted)
    find_learning_rate(trainer, loader(), steps=3)

    assert settings.keys() | {"task"} == trainer.arguments.keys()
    assert {name: trainer.arguments[name] for name in settings} == settings
    assert used == [trainer.arguments]


def test_a_search_applies_the_transform():
    def as_floats(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"x": batch["x"].float() / 255}

    trainer = bowl(1.0)
    trainer.transform = as_floats
    data = [{"x": torch.full((2, 1), 255, dtype=torch.uint8)}]

    assert len(find_learning_rate(trainer, data, steps=3).losses) == 3


def test_the_search_leaves_the_value_of_a_rate_in_a_tensor():
    trainer, rate = bowl(1.0), torch.tensor(0.5)
    trainer.optimizer.param_groups[0]["lr"] = rate
    curve = find_learning_rate(trainer, ONES, steps=3)
    assert curve.rates[-1] == pytest.approx(1.0)
    assert rate == trainer.optimizer.param_groups[0]["lr"] == 0.5


def test_a_loss_that_overflows_ends_the_search():
    curve = find_learning_rate(bowl(1e30), ONES, start=1e-3, end=1e3, steps=50)

    assert not math.isfinite(curve.losses[-1])
    assert len(curve.losses) < 10
    assert curve.suggestion is None


def test_a_search_that_fails_restores_the_weights():
    trainer = bowl(1.0)

    with pytest.raises(KeyError):
        find_learning_rate(trainer, [*ONES, {"y": torch.ones(2, 1)}], steps=5)

    assert float(trainer.model.weight.detach()) == 1.0
    assert trainer.optimizer.param_groups[0]["lr"] == 123.0


def test_all_groups_of_an_optimizer_take_the_rate():
    trainer = classifier(device="cpu")

    curve = find_learning_rate(trainer, SeededLoader(Squares(), 4), steps=8)

    assert all(isinstance(rate, float) for rate in curve.rates)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1, 2]
    assert not trainer.optimizer.state


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start": 0.0}, "0 < start < end"),
        ({"end": 1e-9}, "0 < start"),
        ({"steps": 2}, "steps must"),
    ],
)
def test_an_argument_out_of_range_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        find_learning_rate(make_trainer(), loader(), **wrong)


def test_a_loader_behind_a_wrapper_is_restored_too():
    class Wrapper:
        def __init__(self, inner: SeededLoader) -> None:
            self.inner = inner

        def __iter__(self):
            return iter(self.inner)

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

    inner = SeededLoader(Squares(), 4)
    before = inner.state_dict()

    find_learning_rate(make_trainer(), Wrapper(inner), steps=3)

    assert inner.state_dict() == before


class Alternating(TrainStep):
    """A step with an optimizer of its own for the head."""

    head: torch.optim.Optimizer

    def update(self) -> None:
        super().update()
        self.head.step()


@pytest.mark.parametrize("place", ["function", "method", "step"])
def test_an_optimizer_beside_the_trainers_is_refused_and_not_left_out_of_the_search(place):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    body, head = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    step = {"step": Alternating} if place == "step" else {}
    trainer = Trainer(model, nn.CrossEntropyLoss(), body, task=tasks.classification, **step)
    if place == "step":
        trainer._process_function.head = head
    elif place == "function":
        trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, lambda _: head.step())
    else:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, head.step)

    with pytest.raises(ValueError, match=r"got another, SGD, .* Hold both in a CompositeOptimizer"):
        find_learning_rate(trainer, loader(), steps=3)

    both = CompositeOptimizer(body, head)
    trainer = Trainer(model, nn.CrossEntropyLoss(), both, task=tasks.classification)
    assert len(find_learning_rate(trainer, loader(), steps=3).rates) == 3
