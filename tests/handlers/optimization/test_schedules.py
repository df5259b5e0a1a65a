"""LearningRate: the rate of each iteration, also in a resumed run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import nn

from diptych.engine import StepEvents, Trainer, tasks
from diptych.engine.state.run_state import load_run_state
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
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


def messages(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


def cosine(iteration: int, total: int, warmup: int = 0) -> float:
    if iteration <= warmup:
        return iteration / warmup
    done = min(1.0, (iteration - 1 - warmup) / (total - warmup))
    return (1 + math.cos(math.pi * done)) / 2


def managed(folder: Path, schedule: LearningRate | None, lr: float = 0.1) -> Trainer:
    trainer = make_trainer(lr=lr)
    return trainer.attach(*([] if schedule is None else [schedule]), CheckpointManager(folder))


@pytest.mark.parametrize("resumed", [False, True])
def test_a_finished_schedule_stays_at_its_final_rate_when_the_run_is_extended(
    resumed, tmp_path, caplog
):
    trainer = managed(tmp_path, LearningRate(warmup=2, floor=0.2))
    rates = note_rates(trainer)
    trainer.run(make_loader(), max_epochs=2)
    if resumed:
        trainer = managed(tmp_path, LearningRate(warmup=2, floor=0.2))
        rates += (later := note_rates(trainer))
    trainer.run(make_loader(), max_epochs=3)
    rates += later if resumed else []
    expected = [
        0.1 * (0.2 + 0.8 * cosine(t, 10, 2)) if t > 2 else 0.1 * t / 2 for t in range(1, 16)
    ]
    assert [rate for (rate,) in rates] == pytest.approx(expected, abs=1e-12)
    (said,) = messages(caplog, "fixed when it first started")
    assert "has 10 iterations" in said
    assert "now there are 15" in said
    assert "total=15" in said


@pytest.mark.parametrize(("before", "total"), [(LearningRate(warmup=0), 20), (None, None)])
def test_an_explicit_total_or_a_new_schedule_extends_over_the_resumed_run(
    tmp_path, caplog, before, total
):
    managed(tmp_path, before).run(make_loader(), max_epochs=2)
    trainer = managed(tmp_path, LearningRate(warmup=0, total=total))
    rates = note_rates(trainer)
    trainer.run(make_loader(), max_epochs=4)
    expected = [0.1 * cosine(t, 20) for t in range(11, 21)]
    assert [rate for (rate,) in rates] == pytest.approx(expected, abs=1e-12)
    assert not messages(caplog, "fixed when it first started")


def test_a_schedule_interrupted_inside_keeps_its_length_whatever_the_new_limit(tmp_path):
    first = managed(tmp_path, LearningRate(warmup=0))
    first.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda t: t.terminate())
    first.run(make_loader(), max_epochs=2)
    second = managed(tmp_path, LearningRate(warmup=0))
    rates = note_rates(second)
    second.run(make_loader(), max_epochs=4)
    expected = [0.1 * cosine(t, 10) for t in range(6, 21)]
    assert [rate for (rate,) in rates] == pytest.approx(expected, abs=1e-12)


def test_a_checkpoint_without_a_length_takes_that_of_the_saved_run(tmp_path, caplog):
    caplog.set_level("INFO")
    managed(tmp_path, LearningRate(warmup=0)).run(make_loader(), max_epochs=2)
    (path,) = tmp_path.glob("checkpoint_epoch_2*")
    state = torch.load(path, weights_only=True)
    del state["handlers"]["LearningRate"]
    del state["trainer"]["schedules_saved"]
    trainer = make_trainer().attach(LearningRate(warmup=0))
    load_run_state(trainer, state)
    rates = note_rates(trainer)
    trainer.run(make_loader(), max_epochs=3)
    assert [rate for (rate,) in rates] == pytest.approx([0.0] * 5, abs=1e-12)
    (said,) = messages(caplog, "no length of the schedule")
    assert "10 iterations" in said


def test_a_run_that_starts_over_has_a_new_length():
    trainer = make_trainer().attach(LearningRate(warmup=0))
    trainer.run(make_loader(), max_epochs=1)
    rates = note_rates(trainer)
    trainer.state.max_epochs = None
    trainer.run(make_loader(), max_epochs=2)
    expected = [0.1 * cosine(t, 10) for t in range(1, 11)]
    assert [rate for (rate,) in rates] == pytest.approx(expected, abs=1e-12)


def test_a_length_that_changes_during_the_run_does_not_change_the_schedule():
    loader = make_loader(4)
    trainer = make_trainer().attach(LearningRate(warmup=0, decay="linear"))
    rates = note_rates(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda: loader.extend(make_loader(2)))
    trainer.run(loader, max_epochs=2)
    expected = [0.1 * max(0, 1 - t / 8) for t in range(10)]
    assert [rate for (rate,) in rates] == pytest.approx(expected, abs=1e-12)


def test_a_second_trainer_on_a_used_optimizer_starts_from_its_rate(caplog):
    first = make_trainer().attach(LearningRate(warmup=0, floor=0.5))
    first.run(make_loader(), max_epochs=1)
    (group,) = first.optimizer.param_groups
    group["lr"] = 0.02
    second = first.replica([LearningRate(warmup=0, decay="constant")])
    rates = note_rates(second)
    second.run(make_loader(), max_epochs=1)
    assert rates == [[0.02]] * 5
    (said,) = messages(caplog, "starts from its current rate")
    assert "0.02" in said
    assert "0.1" in said


def test_a_rate_that_is_set_after_attaching_is_the_one_of_a_new_run(tmp_path):
    def build() -> Trainer:
        trainer = managed(tmp_path, LearningRate(warmup=0, decay="linear"))
        trainer.optimizer.param_groups[0]["lr"] = 0.4  # as found by find_learning_rate
        return trainer

    first, second = build(), build()
    rates = note_rates(first)
    first.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda t: t.terminate())
    first.run(make_loader(2), max_epochs=2)
    rates += (later := note_rates(second))
    second.run(make_loader(2), max_epochs=2)
    assert rates + later == [pytest.approx([0.4 * share]) for share in (1, 0.75, 0.5, 0.25)]


def test_a_run_that_starts_over_starts_from_a_rate_that_was_set_since():
    trainer = make_trainer().attach(LearningRate(warmup=0, decay="linear"))
    trainer.run(make_loader(2), max_epochs=1)
    trainer.optimizer.param_groups[0]["lr"] = 0.6
    trainer.state.max_epochs = None
    rates = note_rates(trainer)
    trainer.run(make_loader(2), max_epochs=1)
    assert rates == [pytest.approx([0.6]), pytest.approx([0.3])]


def test_a_state_loaded_by_hand_before_attaching_continues_the_schedule():
    first = make_trainer().attach(LearningRate(warmup=0, total=10))
    first.run(make_loader(), max_epochs=1)
    second = make_trainer(lr=77.0)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.attach(LearningRate(warmup=0, total=10))
    second.load_state_dict(first.state_dict())
    rates = note_rates(second)
    second.run(make_loader(), max_epochs=2)
    expected = [0.1 * cosine(t, 10) for t in range(6, 11)]
    assert [rate for (rate,) in rates] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rate", [0.4, torch.tensor(0.4)])
def test_a_group_added_during_the_run_follows_the_schedule_from_its_own_rate(rate):
    trainer = make_trainer({"lr": 0.1})
    extra = nn.Parameter(torch.zeros(1))
    trainer.model.register_parameter("extra", extra)
    rates = note_rates(trainer)
    trainer.attach(LearningRate(warmup=0, decay="linear"))
    trainer.add_event_handler(
        Events.EPOCH_STARTED(once=2),
        lambda t: t.optimizer.add_param_group({"params": [extra], "lr": rate, "name": "late"}),
    )
    trainer.run(make_loader(2), max_epochs=2)
    shares = [1, 0.75, 0.5, 0.25]
    assert rates[:2] == [pytest.approx([0.1 * share]) for share in shares[:2]]
    assert rates[2:] == [pytest.approx([0.1 * share, 0.4 * share]) for share in shares[2:]]
    assert trainer.metrics.record.values["train/learning_rate/late"] == pytest.approx(0.1)
