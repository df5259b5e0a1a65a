"""ReduceOnPlateau: the rates of torch's scheduler over the published values, also when resumed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from torch import nn

from diptych.engine import Trainer, tasks
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from diptych.handlers.evaluation.evaluation import Evaluation
from diptych.handlers.optimization.reduce_on_plateau import ReduceOnPlateau
from diptych.handlers.optimization.schedules import LearningRate


def make_loader(batches: int = 3, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batches, 4, 3, generator=generator)
    return [{"image": image, "label": torch.arange(4) % 2} for image in images]


def make_trainer(lr: float = 1.0) -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [
        {"params": model[0].parameters()},
        {"params": model[1].parameters(), "lr": lr / 4, "name": "head"},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr)
    loss = nn.CrossEntropyLoss()
    return Trainer(model, loss, optimizer, task=tasks.classification, device="cpu", log_every=1)


def note_rates(trainer: Trainer) -> list[float]:
    """Return a list of the first group's rate in each epoch, filled during the run."""
    rates: list[float] = []
    trainer.add_event_handler(
        Events.EPOCH_STARTED, lambda t: rates.append(float(t.optimizer.param_groups[0]["lr"]))
    )
    return rates


def rates_of_torch(values: list[float], lr: float = 1.0, **settings: float) -> list[float]:
    """Return the rates of torch's own scheduler, stepped with the values in a plain loop."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", **settings)  # type: ignore[arg-type]
    rates = [lr]
    for value in values:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    "settings",
    [
        {"factor": 0.5, "patience": 0, "threshold": 0.1},
        {"factor": 0.5, "patience": 1, "threshold": 0.05, "cooldown": 1},
        {"factor": 0.1, "patience": 0, "threshold": 0.2, "threshold_mode": "abs", "min_lr": 0.05},
    ],
)
def test_the_rates_are_those_of_torchs_scheduler(settings):
    trainer = make_trainer()
    rates = note_rates(trainer)
    trainer.attach(
        Evaluation(make_loader(seed=2)), ReduceOnPlateau(metric="val/loss", mode="min", **settings)
    )
    trainer.run(make_loader(), max_epochs=8)
    values = trainer.metrics.get_history("val/loss")
    assert rates == rates_of_torch(values, **settings)[:8]
    assert len(set(rates)) > 1


def test_values_of_each_evaluation_count_and_those_of_an_epoch_once(caplog):
    caplog.set_level("INFO")
    trainer = make_trainer()
    trainer.attach(
        Evaluation(make_loader(seed=2), every=2),
        ReduceOnPlateau(
            metric="val/loss", patience=0, threshold=99.0, threshold_mode="abs", factor=0.5
        ),
    )
    trainer.run(make_loader(4), max_epochs=2)
    assert len(trainer.metrics.get_history("val/loss")) == 4
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5**3
    assert trainer.optimizer.param_groups[1]["lr"] == 0.25 * 0.5**3
    said = [record.getMessage() for record in caplog.records if "instead of" in record.getMessage()]
    assert len(said) == 3
    assert "0.5 instead of 1 after iteration 4: val/loss" in said[0]


def managed(folder: Path) -> tuple[Trainer, list[float]]:
    trainer = make_trainer()
    trainer.attach(
        ReduceOnPlateau(metric="train/loss", factor=0.5, patience=1, threshold=0.1),
        CheckpointManager(folder),
    )
    return trainer, note_rates(trainer)


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(at, tmp_path):
    uncut, whole = managed(tmp_path / "whole")
    uncut.run(make_loader(), max_epochs=9)
    first, before = managed(tmp_path / "cut")
    first.add_event_handler(Events.EPOCH_COMPLETED(once=at), lambda t: t.terminate())
    first.run(make_loader(), max_epochs=9)
    second, after = managed(tmp_path / "cut")
    second.run(make_loader(), max_epochs=9)
    assert before + after == whole
    assert len(set(whole)) > 2
    for key, value in uncut.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value)


def test_a_nan_counts_as_no_improvement_and_is_logged(caplog):
    trainer = make_trainer()
    trainer.attach(ReduceOnPlateau(metric="score", patience=1, factor=0.5))
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda t: t.metrics.update({"score": math.nan})
    )
    trainer.run(make_loader(), max_epochs=2)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5
    told = [one.getMessage() for one in caplog.records if "NaN" in one.getMessage()]
    assert [text.split(" counts")[0] for text in told] == [
        f"score is NaN after iteration {iteration}: ReduceOnPlateau" for iteration in (3, 6)
    ]


def test_a_group_added_during_the_run_is_reduced_too():
    trainer = make_trainer()
    trainer.model.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    trainer.attach(
        ReduceOnPlateau(
            metric="train/loss", patience=0, threshold=99.0, threshold_mode="abs", factor=0.5
        )
    )
    trainer.add_event_handler(
        Events.EPOCH_STARTED(once=2),
        lambda t: t.optimizer.add_param_group({"params": [t.model.extra], "lr": 8.0}),
    )
    trainer.run(make_loader(), max_epochs=3)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.25, 0.0625, 2.0]


def test_the_rates_are_published():
    trainer = make_trainer()
    trainer.attach(
        ReduceOnPlateau(
            metric="train/loss", patience=0, threshold=99.0, threshold_mode="abs", factor=0.5
        )
    )
    trainer.run(make_loader(), max_epochs=3)
    values = trainer.metrics.record.values
    assert values["train/learning_rate"] == 0.5
    assert values["train/learning_rate/head"] == 0.125


def test_a_run_that_starts_over_forgets_the_best_value():
    handler = ReduceOnPlateau(
        metric="train/loss", patience=0, threshold=99.0, threshold_mode="abs", factor=0.5
    )
    trainer = make_trainer().attach(handler)
    trainer.run(make_loader(), max_epochs=1)
    trainer.state.max_epochs = None
    trainer.run(make_loader(), max_epochs=1)
    assert trainer.optimizer.param_groups[0]["lr"] == 1.0
    assert handler.state_dict()["judged"] == 1


@pytest.mark.parametrize("first", [True, False])
def test_a_second_handler_that_sets_the_rates_is_refused(first):
    handlers = [ReduceOnPlateau(metric="train/loss"), LearningRate(warmup=1)]
    trainer = make_trainer().attach(*(handlers if first else handlers[::-1]))
    with pytest.raises(ValueError, match=r"must be the only handler .* got LearningRate too"):
        trainer.run(make_loader(), max_epochs=1)


def test_a_metric_that_is_never_published_is_an_error():
    trainer = make_trainer().attach(ReduceOnPlateau(metric="val/los"))
    with pytest.raises(KeyError, match="got 'val/los'; there are train/loss"):
        trainer.run(make_loader(), max_epochs=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1.0}, r"factor must lie in \(0, 1\), got 1.0"),
        ({"patience": -1}, "patience must be a whole number of values >= 0, got -1"),
        ({"mode": "least"}, "mode must be one of max, min, got 'least'"),
        ({"threshold_mode": "relative"}, "threshold_mode must be one of rel, abs"),
        ({"min_lr": -1.0}, "min_lr must be >= 0"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReduceOnPlateau(**arguments)


def test_one_that_joins_a_run_does_not_judge_the_values_before():
    trainer, loader = make_trainer(), make_loader()
    values = {"score": 1.0}
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda t: t.metrics.update(values))
    trainer.run(loader, max_epochs=3)
    trainer.attach(ReduceOnPlateau(metric="score", factor=0.5, patience=0))
    rates = note_rates(trainer)
    trainer.run(loader, max_epochs=6)

    assert rates == [1.0, 1.0, 0.5]
