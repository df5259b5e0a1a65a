"""StagePlan: the trained parameters, rates, losses and data of each stage."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine import MetricsEvents, RunEvents, StepEvents, tasks
from diptych.handlers import Evaluation, LearningRate, Stage, WeightAverage
from diptych.losses import CrossEntropyLoss, OneOf, WeightedSum
from tests.engine.loop.loops import Unsized
from tests.handlers.runs import report_each_epoch
from tests.handlers.staged import (
    ALL,
    HEAD,
    copy_of,
    evaluated,
    loader,
    make_trainer,
    noted,
    plan_of,
    rates_of,
)


def test_a_stage_trains_only_the_parameters_that_it_names():
    trainer = make_trainer(HEAD, ALL)
    before = copy_of(trainer.model)
    trainer.run(loader(), max_iters=5)
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if "running" not in name} == {
        "head.weight",
        "head.bias",
        "plain.num_batches_tracked",
    }
    trainer.run(loader(), max_iters=6)
    assert not torch.equal(before["stem.0.weight"], trainer.model.state_dict()["stem.0.weight"])


def test_the_plan_determines_the_length_of_the_run():
    trainer = make_trainer(
        HEAD,
        Stage("some", trains=["head", "blocks"], steps=7, lr=0.1),
        Stage("all", epochs=2, lr=0.1),
    )
    indices = noted(trainer, lambda: plan_of(trainer).progress.index)
    epochs = noted(trainer, lambda: trainer.state.epoch)
    trainer.run(loader())
    assert indices == [0] * 5 + [1] * 7 + [2] * 10
    assert epochs == [1] * 5 + [2] * 5 + [3] * 2 + [4] * 5 + [5] * 5
    assert trainer.state.epoch == trainer.state.max_epochs == 5


def test_a_decay_over_a_loader_without_a_length_needs_an_epoch_length():
    schedule = LearningRate(warmup=0, decay="cosine")
    stage = Stage("head", trains="head", epochs=2, lr=0.1, schedule=schedule)
    with pytest.raises(ValueError, match="cosine decay needs the length of stage 'head'"):
        make_trainer(stage).run(Unsized(list(loader())))
    make_trainer(stage).run(Unsized(list(loader())), epoch_length=5)


def test_a_finished_plan_trains_no_further(caplog):
    trainer = make_trainer(HEAD)
    trainer.run(loader())
    trainer.run(loader())
    assert "Nothing to do" in caplog.text
    trainer.run(loader(), max_epochs=9)
    assert trainer.state.iteration == 5


def test_batch_norms_of_frozen_parts_stay_in_eval_mode():
    trainer = make_trainer(HEAD, Stage("all", epochs=1, lr=0.1))
    trainer.attach(Evaluation(list(loader()), at_start=True))
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda _: trainer.model.train())
    model = trainer.model
    modes = noted(
        trainer,
        lambda: (model.stem[1].training, model.plain.training, model.drop.training),
        StepEvents.FORWARD_COMPLETED,
    )
    counts = noted(trainer, lambda: int(model.stem[1].num_batches_tracked))
    trainer.run(loader())
    # The norm without parameters is decided by what is around it, which trains a head.
    assert modes == [(False, True, True)] * 5 + [(True, True, True)] * 5
    assert counts == [0] * 5 + [1, 2, 3, 4, 5]


def test_each_stage_has_its_own_rates_decay_and_schedule():
    trainer = make_trainer(
        Stage(
            "head", trains="head", steps=4, lr=0.1, schedule=LearningRate(warmup=2, decay="linear")
        ),
        Stage(
            "all",
            epochs=1,
            weight_decay=0.3,
            by_component={"stem": 0.1, "blocks": 0.2, "head": {"lr": 0.4, "betas": (0.5, 0.9)}},
            schedule=LearningRate(warmup=0, decay="cosine"),
        ),
    )
    rates = noted(trainer, lambda: rates_of(trainer), StepEvents.GRADIENTS_READY)
    trainer.run(loader())
    assert [r["head.weight"] for r in rates] == pytest.approx(
        [0.05, 0.1, 0.1, 0.05] + [0.2 * (1 + math.cos(math.pi * i / 5)) for i in range(5)]
    )
    assert [r["stem.0.bias"] for r in rates[:4]] == [0.0] * 4
    assert rates[4]["stem.0.weight"] == 0.1
    assert rates[4]["blocks.1.0.weight"] == 0.2
    groups = {g["name"]: g for g in trainer.optimizer.param_groups}
    assert groups["head"]["weight_decay"] == 0.3
    assert groups["head/no_decay"]["weight_decay"] == 0.0
    assert groups["head"]["betas"] == (0.5, 0.9)
    assert groups["stem.0"]["betas"] == (0.9, 0.999)


def test_rates_fall_from_layer_to_layer():
    trainer = make_trainer(Stage("all", steps=1, lr=1.0, layer_decay={"blocks": 0.5}))
    rates = noted(trainer, lambda: rates_of(trainer))
    trainer.run(loader())
    expected = {"stem": 0.125, "blocks.0": 0.25, "blocks.1": 0.5, "head": 1.0}
    for path, rate in expected.items():
        assert rates[0][f"{path}.{'0.' if path != 'head' else ''}weight"] == rate


def test_every_trained_parameter_is_in_one_group():
    trainer = make_trainer(HEAD, ALL)
    held = [id(p) for g in trainer.optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.model.parameters())


def test_moments_are_kept_or_reset():
    for choice, steps in (("keep", 6.0), ("reset", 1.0)):
        trainer = make_trainer(HEAD, Stage("all", steps=1, lr=0.1, optimizer_state=choice))
        trainer.run(loader())
        state = trainer.optimizer.state
        assert float(state[trainer.model.head.weight]["step"]) == steps
        assert float(state[trainer.model.stem[0].weight]["step"]) == 1.0


def test_a_stage_sets_losses_weights_and_any_attribute():
    parts = {"first": CrossEntropyLoss(), "second": CrossEntropyLoss()}
    weighted = WeightedSum(losses=parts)
    loss = OneOf(losses={"plain": CrossEntropyLoss(), "sum": weighted})
    trainer = make_trainer(
        Stage("one", steps=1, lr=0.1, loss="plain"),
        Stage(
            "two", steps=1, lr=0.1, loss="sum", settings={"loss.losses.sum.weights.second": 0.25}
        ),
        Stage("three", steps=1, lr=0.1, settings={"model.drop.p": 0.0}),
        loss=loss,
    )
    seen = noted(trainer, lambda: (loss.active, weighted.weights["second"], trainer.model.drop.p))
    trainer.run(loader())
    assert seen == [("plain", 1.0, 0.2), ("sum", 0.25, 0.2), ("sum", 0.25, 0.0)]


def test_loss_weights_are_those_of_a_weighted_sum():
    loss = WeightedSum(losses={"a": CrossEntropyLoss(), "b": CrossEntropyLoss()})
    trainer = make_trainer(Stage("one", steps=1, lr=0.1, loss_weights={"a": 0.0}), loss=loss)
    trainer.run(loader())
    assert loss.weights == {"a": 0.0, "b": 1.0}


def test_batch_sizes_and_loaders_change_with_the_stage():
    def backwards(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return tasks.classification(model, {**batch, "image": -batch["image"]})

    other = loader(6)
    trainer = make_trainer(
        Stage("large", epochs=1, lr=0.1, batch_size=10),
        Stage("other", epochs=2, lr=0.1, loader=other, task=backwards),
        Stage("usual", epochs=1, lr=0.1),
    )
    sizes = noted(trainer, lambda: len(trainer.state.batch["image"]))
    used = noted(trainer, lambda: trainer.task is backwards)
    trainer.run(loader())
    assert sizes == [10] * 2 + [4, 2] * 2 + [4] * 5
    assert used == [False] * 2 + [True] * 4 + [False] * 5
    assert trainer.state.epoch == 4


def test_values_of_the_metric_count_for_the_stage_that_publishes_them():
    trainer = make_trainer(
        Stage("first", epochs=9, lr=0.1, metric="val/recall", patience=2),
        Stage("last", epochs=9, lr=0.1, metric="val/recall", patience=2, mode="min"),
    )
    evaluated(trainer, [0.5, 0.9, 0.8, 0.9, 0.3, 0.2, 0.3, math.nan, 0.0])
    indices = noted(trainer, lambda: plan_of(trainer).progress.index, Events.EPOCH_COMPLETED)
    trainer.run(loader())
    assert indices == [0] * 4 + [1] * 4
    assert trainer.state.epoch == trainer.state.max_epochs == 8


def test_patience_may_end_a_stage_inside_an_epoch():
    trainer = make_trainer(Stage("first", epochs=9, lr=0.1, metric="val/recall", patience=1), HEAD)
    evaluated(trainer, [0.5, 0.4, 0.3, 0.2, 0.1], every=4)
    indices = noted(trainer, lambda: plan_of(trainer).progress.index)
    trainer.run(loader())
    assert indices == [0] * 8 + [1] * 5


def test_a_stage_may_start_with_the_best_weights_of_the_previous_one():
    trainer = make_trainer(
        Stage("first", epochs=3, lr=0.1, metric="val/recall"),
        Stage("second", epochs=1, lr=0.1, load="best"),
    )
    evaluated(trainer, [0.5, 0.9, 0.8, 0.1])
    weights = noted(trainer, lambda: copy_of(trainer.model), RunEvents.SAFE_POINT)
    starts = noted(trainer, lambda: copy_of(trainer.model), Events.GET_BATCH_STARTED)
    trainer.run(loader())
    for name, value in weights[9].items():
        assert torch.equal(starts[15][name], value), name
        if "bias" in name:
            assert not torch.equal(weights[14][name], value), name


def test_a_value_published_after_the_plan_at_the_end_of_the_last_epoch_counts():
    trainer = make_trainer(
        Stage("first", epochs=2, lr=0.1, metric="val/recall"),
        Stage("second", epochs=1, lr=0.1, load="best"),
    )
    report_each_epoch(trainer, 0.5, 0.9, 0.1, tag="val/recall")
    weights = noted(trainer, lambda: copy_of(trainer.model), RunEvents.SAFE_POINT)
    starts = noted(trainer, lambda: copy_of(trainer.model), Events.GET_BATCH_STARTED)
    best: list[float | None] = []
    trainer.add_event_handler(
        MetricsEvents.EPOCH_PUBLISHED, lambda: best.append(plan_of(trainer).progress.best)
    )
    trainer.run(loader())
    assert best == [0.5, 0.9, None]
    assert all(torch.equal(starts[10][name], value) for name, value in weights[9].items())


def test_the_best_weights_are_the_averaged_ones_if_the_metric_scores_those():
    trainer = make_trainer(
        Stage("first", epochs=3, lr=0.1, metric="val/loss", mode="min"),
        Stage("second", epochs=1, lr=0.1, load="best"),
    )
    average = WeightAverage(decay=0.9)
    trainer.attach(average, Evaluation(list(loader())))
    averages = noted(trainer, average.average_state_dict, RunEvents.SAFE_POINT)
    starts = noted(trainer, lambda: copy_of(trainer.model), Events.GET_BATCH_STARTED)
    trainer.run(loader())
    scores = trainer.metrics.get_history("val/loss")[:3]
    best = 5 * scores.index(min(scores)) + 4
    for name, value in averages[best].items():
        assert torch.equal(starts[15][name], value), name


def test_a_run_that_starts_over_starts_with_the_first_stage():
    trainer = make_trainer(HEAD, Stage("all", epochs=1, lr=0.1, batch_size=10))
    indices = noted(trainer, lambda: plan_of(trainer).progress.index)
    trainer.run(batches := loader())
    trainer.state.max_epochs = None
    trainer.run(batches)
    assert indices == ([0] * 5 + [1] * 2) * 2


def test_the_plan_is_logged_once_with_stages_groups_and_rates(caplog):
    caplog.set_level(logging.INFO, logger="diptych")
    trainer = make_trainer(
        HEAD, Stage("all", epochs=2, lr=0.01, weight_decay=0.1, schedule=LearningRate(warmup=3))
    )
    trainer.run(loader())
    messages = [record.getMessage() for record in caplog.records]
    (plan,) = (message for message in messages if "StagePlan with 2 stages" in message)
    assert "1. head: 1 epoch; trains head: 14 of 134 parameters" in plan
    assert "2. all: 2 epochs; trains *: 134 of 134 parameters" in plan
    assert "lr 1.00e-01 ████████████████" in plan
    assert "schedule ▃▆███▇▅▄▂▁" in plan
    assert plan_of(trainer).describe() == plan.partition("\n")[2]


def test_stage_and_rates_are_published():
    trainer = make_trainer(HEAD, ALL)
    trainer.run(loader())
    values = trainer.metrics.record.values
    assert values["train/stage"] == 2.0
    assert values["train/learning_rate"] == values["train/learning_rate/head"] == 0.01


def test_a_group_that_is_added_during_a_stage_keeps_its_rate_and_the_plan_its_own():
    trainer = make_trainer(HEAD, Stage("all", epochs=1, lr=0.2, weight_decay=0.5))
    extra = nn.Parameter(torch.ones(1))
    trainer.add_event_handler(
        Events.EPOCH_STARTED(once=1),
        lambda t: t.optimizer.add_param_group({"params": [extra], "lr": 7.0, "weight_decay": 0.0}),
    )
    trainer.run(loader())
    *planned, added = trainer.optimizer.param_groups
    assert {group["lr"] for group in planned} == {0.2}
    assert (added["lr"], added["weight_decay"]) == (7.0, 0.0)
