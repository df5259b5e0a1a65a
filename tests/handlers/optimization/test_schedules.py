"""LearningRate: the rate of each iteration, also in a resumed run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from diptych.engine import StepEvents, Trainer, tasks
from diptych.handlers.optimization.schedules import LearningRate


def make_loader(batches: int = 5) -> list[dict[str, torch.Tensor]]:
    return [{"image": torch.randn(4, 3), "label": torch.arange(4) % 2} for _ in range(batches)]


def make_trainer(*groups: dict[str, Any], lr: float | torch.Tensor = 0.1) -> Trainer:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    layers = [{"params": layer.parameters(), **group} for layer, group in zip(model, groups)]  # noqa: B905
    optimizer = torch.optim.SGD(layers or model.parameters(), lr=lr)
    loss = nn.CrossEntropyLoss()
    return Trainer(model, loss, optimizer, task=tasks.classification, device="cpu", log_every=1)


def note_rates(trainer: Trainer) -> list[list[float]]:
    """Return a list of the rates of each update, filled during the run."""
    rates: list[list[float]] = []
    trainer.add_event_handler(
        StepEvents.GRADIENTS_READY,
        lambda: rates.append([float(group["lr"]) for group in trainer.optimizer.param_groups]),
    )
    return rates


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("linear", [1, 2, 3, 4, 4, 3.6, 3.2, 2.8, 2.4, 2.0]),
        ("constant", [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]),
        ("cosine", [1, 2, 3, 4, *(2 + 2 * math.cos(math.pi * i / 6) for i in range(6))]),
    ],
)
def test_rates_rise_linearly_then_follow_the_decay(decay, expected):
    trainer = make_trainer(lr=4.0)
    rates = note_rates(trainer)
    floor = {"linear": 0.4, "constant": 0.5, "cosine": 0.0}[decay]
    trainer.attach(LearningRate(warmup=4, decay=decay, floor=floor))
    trainer.run(make_loader(), max_epochs=2)
    assert [rate for (rate,) in rates] == pytest.approx(expected, abs=1e-12)


def test_the_rate_stays_at_the_floor_after_the_end():
    rate = LearningRate(warmup=0, floor=0.1, total=5)
    assert rate.factor(1, 5) == 1
    assert [rate.factor(iteration, 5) for iteration in (6, 7, 1000)] == pytest.approx([0.1] * 3)


def test_rates_of_groups_keep_their_ratio():
    trainer = make_trainer({"lr": 1.0}, {"lr": 0.01})
    rates = note_rates(trainer)
    trainer.attach(LearningRate(warmup=2, decay="constant"))
    trainer.run(make_loader(3), max_epochs=1)
    assert rates == [pytest.approx(pair) for pair in ([0.5, 0.005], [1.0, 0.01], [1.0, 0.01])]


def test_a_rate_in_a_tensor_is_changed_in_place():
    rate = torch.tensor(0.5)
    trainer = make_trainer(lr=rate)
    trainer.attach(LearningRate(warmup=0, decay="linear"))
    trainer.run(make_loader(2), max_epochs=1)
    assert trainer.optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.25


def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one():
    whole = make_trainer()
    expected = note_rates(whole)
    whole.attach(LearningRate(warmup=3))
    whole.run(make_loader(), max_epochs=4)

    first = make_trainer()
    rates = note_rates(first)
    first.attach(LearningRate(warmup=3, total=20))
    first.run(make_loader(), max_epochs=2)
    second = make_trainer(lr=77.0)  # its own rate is in the optimizer's state
    second.attach(LearningRate(warmup=3, total=20))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    rates += (resumed := note_rates(second))
    second.run(make_loader(), max_epochs=4)
    assert rates + resumed == expected


def test_the_current_rate_is_published():
    trainer = make_trainer()
    trainer.attach(LearningRate(warmup=4))
    trainer.run(make_loader(2), max_epochs=10)
    assert trainer.metrics.record.values["train/learning_rate"] > 0
    assert trainer.metrics.record.values["train/learning_rate"] == pytest.approx(
        0.1 * (1 + math.cos(math.pi * 15 / 16)) / 2
    )


def test_different_rates_are_published_by_the_names_of_their_groups():
    trainer = make_trainer({"lr": 1.0, "name": "image"}, {"lr": 0.01})
    trainer.attach(LearningRate(warmup=0, decay="constant"))
    trainer.run(make_loader(2), max_epochs=1)
    values = trainer.metrics.record.values
    rates = {tag: value for tag, value in values.items() if "learning_rate" in tag}
    assert rates == pytest.approx(
        {
            "train/learning_rate": 1.0,
            "train/learning_rate/image": 1.0,
            "train/learning_rate/1": 0.01,
        }
    )


def test_a_decay_over_an_unknown_length_is_refused():
    trainer = make_trainer().attach(LearningRate(warmup=0))
    endless = type("Endless", (), {"__iter__": lambda _: iter(make_loader())})()
    with pytest.raises(ValueError, match="cosine decay needs the length of the run, got a loader"):
        trainer.run(endless, max_epochs=2)
    make_trainer().attach(LearningRate(warmup=0, total=9)).run(endless, max_epochs=1)
    make_trainer().attach(LearningRate(decay="constant")).run(endless, max_epochs=1)


def test_the_length_may_be_given_in_iterations():
    trainer = make_trainer(lr=1.0)
    rates = note_rates(trainer)
    trainer.attach(LearningRate(warmup=0, decay="linear"))
    trainer.run(make_loader(), max_iters=4)
    assert [rate for (rate,) in rates] == [1.0, 0.75, 0.5, 0.25]


def test_a_warm_up_that_does_not_end_is_refused():
    trainer = make_trainer().attach(LearningRate(warmup=10))
    with pytest.raises(ValueError, match=r"shorter than the 10 iterations .* got 10\. Shorten it"):
        trainer.run(make_loader(), max_epochs=2)


def test_a_second_schedule_is_refused():
    trainer = make_trainer().attach(LearningRate())
    with pytest.raises(ValueError, match="must have one LearningRate"):
        trainer.attach(LearningRate())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup": -1}, "warmup must be a whole number of iterations >= 0, got -1"),
        ({"warmup": 0.1}, "got 0.1"),
        ({"decay": "cosin"}, "decay must be one of cosine, linear, constant, got 'cosin'"),
        ({"floor": 1.5}, r"floor must be a share of the rate in \[0, 1\], got 1.5"),
        ({"total": 0}, "total must be a whole number of iterations >= 1, got 0"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningRate(**arguments)
