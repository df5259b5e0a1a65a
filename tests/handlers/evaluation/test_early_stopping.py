"""Early stopping: which values count, when a run ends, and that it stays stopped."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Average, Metric
from torch import nn

from diptych.engine import EvaluationEvents, MetricsEvents, Trainer, tasks
from diptych.engine.state.run_state import load_run_state, run_state
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from diptych.handlers.evaluation.early_stopping import EarlyStopping
from diptych.handlers.evaluation.evaluation import Evaluation

NAME = "val/score"


def make_loader() -> list[dict[str, torch.Tensor]]:
    return [{"image": torch.randn(4, 3), "label": torch.arange(4) % 2} for _ in range(2)]


def make_trainer() -> Trainer:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.CrossEntropyLoss()
    return Trainer(model, loss, optimizer, task=tasks.classification, device="cpu")


def publish(trainer: Trainer, *values: float) -> None:
    """Publish one value at the end of each epoch."""

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate() -> None:
        value = {NAME: values[trainer.state.epoch - 1]}
        trainer.state.metrics.update(value)
        trainer.metrics.report(trainer.state.iteration, value)
        trainer.fire_event(EvaluationEvents.EVALUATED)


def test_each_nan_is_logged_once_also_in_a_resumed_run(caplog, tmp_path):
    def run(epochs: int) -> None:
        trainer = make_trainer()
        trainer.attach(
            EarlyStopping(metric=NAME, patience=9), CheckpointManager(tmp_path, every="epoch")
        )
        publish(trainer, 0.1, math.nan, 0.2, math.nan)
        trainer.run(make_loader(), max_epochs=epochs)

    run(2)
    run(4)

    told = [one.getMessage() for one in caplog.records if "NaN" in one.getMessage()]
    assert [text.split(":")[0] for text in told] == [
        f"{NAME} is NaN after iteration 4",
        f"{NAME} is NaN after iteration 8",
    ]
    assert "EarlyStopping counts it as no improvement" in told[0]


@pytest.mark.parametrize(
    ("mode", "values", "epochs", "best"),
    [
        ("max", (0.1, 0.3, 0.2, 0.3, 0.9), 4, 0.3),  # an equal value is no improvement
        ("min", (0.5, 0.4, 0.6, 0.45, 0.1), 4, 0.4),
        ("max", (0.1, math.nan, 0.2, math.nan, math.nan), 5, 0.2),
        ("max", (-5.0, -4.0, -4.5, -3.0, -3.5), 5, -3.0),
    ],
)
def test_patience_counts_the_values_without_improvement(mode, values, epochs, best):
    trainer = make_trainer()
    stopping = EarlyStopping(metric=NAME, patience=2, mode=mode)
    trainer.attach(stopping)
    publish(trainer, *values)
    trainer.run(make_loader(), max_epochs=len(values))
    assert (trainer.state.epoch, stopping.best) == (epochs, best)
    assert stopping.stopped == (stopping.waited == 2)


def test_an_improvement_must_exceed_min_delta():
    trainer = make_trainer()
    stopping = EarlyStopping(metric=NAME, patience=2, min_delta=0.25)
    trainer.attach(stopping)
    publish(trainer, 0.0, 0.25, 0.5, 0.75, 0.75)
    trainer.run(make_loader(), max_epochs=5)
    assert (stopping.best, stopping.best_iteration, trainer.state.epoch) == (0.5, 6, 5)


def test_an_epochs_mean_is_judged_at_the_epochs_end():
    trainer = make_trainer()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.attach(EarlyStopping(metric="train/loss", mode="min", patience=3))
    trainer.run(make_loader(), max_epochs=9)
    assert trainer.state.epoch == 4


@pytest.mark.parametrize("stopping_first", [True, False])
def test_a_value_published_at_the_end_of_an_epoch_is_judged_in_it(stopping_first):
    trainer, stopping = make_trainer(), EarlyStopping(metric=NAME, patience=1)
    if stopping_first:
        trainer.attach(stopping)

    @trainer.on(Events.EPOCH_COMPLETED)
    def report() -> None:
        trainer.metrics.report(trainer.state.iteration, {NAME: -float(trainer.state.epoch)})

    if not stopping_first:
        trainer.attach(stopping)
    trainer.run(make_loader(), max_epochs=5)
    assert (trainer.state.epoch, stopping.best, stopping.best_iteration) == (2, -1.0, 2)


def test_two_metrics_keep_their_own_memory_whatever_their_order():
    def attached(trainer: Trainer, *metrics: str) -> dict[str, EarlyStopping]:
        stoppings = {metric: EarlyStopping(metric=metric, patience=9) for metric in metrics}
        trainer.attach(*stoppings.values())
        publish(trainer, 0.1, 0.2)
        return stoppings

    trainer = make_trainer()
    before = attached(trainer, NAME, "train/loss")
    trainer.run(make_loader(), max_epochs=1)
    resumed = make_trainer()
    after = attached(resumed, "train/loss", NAME)
    load_run_state(resumed, run_state(trainer))
    assert {m: s.best for m, s in after.items()} == {m: s.best for m, s in before.items()}
    assert after[NAME].best != after["train/loss"].best


def test_another_evaluation_in_between_is_not_counted():
    trainer = make_trainer()
    stopping = EarlyStopping(metric="val/loss", mode="min", patience=2, min_delta=1e6)
    trainer.attach(
        stopping,
        Evaluation(make_loader(), every=1, prefix="test"),
        Evaluation(make_loader(), every=4),
    )
    trainer.run(make_loader(), max_epochs=10)
    assert trainer.state.iteration == 12


def make_stopped(values: tuple[float, ...]) -> tuple[Trainer, EarlyStopping]:
    trainer = make_trainer()
    stopping = EarlyStopping(metric=NAME, patience=1)
    trainer.attach(stopping)
    publish(trainer, *values)
    trainer.run(make_loader(), max_epochs=len(values))
    return trainer, stopping


def test_a_stopped_run_stays_stopped_when_it_is_resumed(caplog):
    trainer, stopping = make_stopped((0.2, 0.1, 0.3))
    resumed = make_trainer()
    again = EarlyStopping(metric=NAME, patience=1)
    resumed.attach(again)
    publish(resumed, 0.2, 0.1, 0.3, 0.4)
    resumed.load_state_dict(trainer.state_dict())
    resumed.metrics.load_state_dict(trainer.metrics.state_dict())
    again.load_state_dict(stopping.state_dict())
    with caplog.at_level(logging.WARNING):
        resumed.run(make_loader(), max_epochs=4)
    assert resumed.state.epoch == 2
    assert "ends the run again: val/score has not improved on 0.2 for 1 values." in caplog.text
    again.reset()
    resumed.run(make_loader(), max_epochs=4)
    assert (resumed.state.epoch, again.best) == (4, 0.4)


def test_a_stopped_run_continues_with_more_patience_until_that_ends():
    trainer, stopping = make_stopped((0.3, 0.1, 0.2, 0.1, 0.9))
    stopping.patience = 3
    trainer.run(make_loader(), max_epochs=5)
    assert (trainer.state.epoch, stopping.waited, stopping.stopped) == (4, 3, True)


def test_a_resumed_run_stops_where_the_uninterrupted_one_does():
    values = (0.3, 0.1, 0.2, 0.9)
    trainer = make_trainer()
    stopping = EarlyStopping(metric=NAME, patience=2)
    trainer.attach(stopping)
    publish(trainer, *values)
    trainer.run(make_loader(), max_epochs=2)
    trainer.run(make_loader(), max_epochs=4)
    assert (trainer.state.epoch, stopping.stopped) == (3, True)


def test_a_run_that_starts_over_starts_with_an_empty_memory():
    trainer, stopping = make_stopped((0.2, 0.1, 0.3))
    trainer.state.max_epochs = None
    trainer.run(make_loader(), max_epochs=1)
    assert (trainer.state.epoch, stopping.best, stopping.stopped) == (1, 0.2, False)


def test_a_metric_that_its_evaluation_does_not_publish_is_an_error_that_lists_the_others():
    trainer = make_trainer()
    trainer.attach(EarlyStopping(metric="val/recal@1"), Evaluation(make_loader()))
    with pytest.raises(KeyError, match=r"got 'val/recal@1'; there are train/loss, val/loss"):
        trainer.run(make_loader(), max_epochs=3)
    assert trainer.state.iteration == 0


def test_a_metric_that_nothing_publishes_is_an_error_at_the_end_of_the_first_epoch():
    trainer = make_trainer()
    trainer.attach(EarlyStopping(metric="train/lost"))
    with pytest.raises(KeyError, match=r"^metric must be .* got 'train/lost'; there are"):
        trainer.run(make_loader(), max_epochs=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 0}, "patience must be a whole number >= 1, got 0"),
        ({"patience": 1.5}, "got 1.5"),
        ({"mode": "most"}, "mode must be one of max, min, got 'most'"),
        ({"min_delta": -1}, "min_delta must be >= 0 and finite, got -1"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**arguments)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["at the end of an epoch", "in every iteration"])
def test_a_value_that_an_ignite_metric_puts_into_the_state_counts_once_an_epoch(kind, first):
    scores = iter([0.3, 0.3, 0.5, 0.5, 0.2, 0.2, 0.1, 0.1, 0.9, 0.9])  # two iterations an epoch
    trainer = make_trainer()
    stopping = EarlyStopping(metric="score", patience=2)
    if first:
        trainer.attach(stopping)
    usage = "batch_wise" if kind == "in every iteration" else "epoch_wise"
    Average(output_transform=lambda _: next(scores)).attach(trainer, "score", usage=usage)
    if not first:
        trainer.attach(stopping)
    trainer.run(make_loader(), max_epochs=5)
    assert (stopping.best, stopping.best_iteration, trainer.state.epoch) == (0.5, 4, 4)


def test_the_value_of_an_attached_ignite_metric_is_published_and_ranks_checkpoints(tmp_path):
    scores = iter([0.3, 0.5, 0.2])
    trainer, records = make_trainer(), []
    manager = CheckpointManager(tmp_path, best="score", keep=1)
    trainer.attach(manager)
    Average(output_transform=lambda _: 0.0).attach(trainer, "zero")
    EpochScore(scores).attach(trainer, "score")
    trainer.add_event_handler(
        MetricsEvents.LOGGED, lambda: records.append(dict(trainer.metrics.record.values))
    )
    trainer.run(make_loader(), max_epochs=3)
    assert trainer.metrics.get_history("score") == [0.3, 0.5, 0.2]
    own = [record for record in records if "score" in record]
    assert own == [{"zero": 0.0, "score": score} for score in (0.3, 0.5, 0.2)]
    assert manager.get_best_checkpoint().name == "checkpoint_epoch_2.pt"


class EpochScore(Metric):
    """The next of several given values."""

    def __init__(self, scores: Iterator[float]) -> None:
        self._scores = scores
        super().__init__()

    def reset(self) -> None: ...

    def update(self, output: object) -> None: ...

    def compute(self) -> float:
        return next(self._scores)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_value_published_after_an_evaluation_inside_an_epoch_counts_at_once(first):
    trainer = make_trainer()
    stopping = EarlyStopping(metric="val/own", patience=1)
    if first:
        trainer.attach(stopping)
    trainer.attach(Evaluation(make_loader(), every=1))
    trainer.add_event_handler(
        EvaluationEvents.EVALUATED, lambda t: t.metrics.update({"val/own": -t.state.iteration})
    )
    if not first:
        trainer.attach(stopping)
    trainer.run(make_loader(), max_epochs=5)
    assert trainer.state.iteration == 2


def test_a_run_that_starts_over_judges_its_own_values():
    trainer = make_trainer()
    stopping = EarlyStopping(metric="val/loss", patience=9, mode="min")
    trainer.attach(stopping, Evaluation(make_loader(), every=1000, at_start=True))
    trainer.run(make_loader(), max_epochs=1)
    with torch.no_grad():
        trainer.model.weight += 5
    trainer.state.max_epochs = None
    trainer.run(make_loader(), max_epochs=1)
    (start,) = trainer.metrics.get_history("val/loss")
    assert stopping.best == start


def test_one_that_joins_a_run_does_not_judge_the_values_before():
    trainer = make_trainer()
    publish(trainer, 0.9, 0.1, 0.1, 0.3, 0.2, 0.2)
    loader = make_loader()
    trainer.run(loader, max_epochs=3)
    stopping = EarlyStopping(metric=NAME, patience=2)
    trainer.attach(stopping)
    trainer.run(loader, max_epochs=6)

    assert (stopping.best, stopping.best_iteration) == (0.3, 8)
    assert trainer.state.epoch == 6
