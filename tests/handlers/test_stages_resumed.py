"""A plan that is interrupted in any stage continues as if it had not been."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events

from diptych.engine import SeededLoader, Trainer, certify
from diptych.handlers import CheckpointManager, Evaluation, LearningRate, Stage
from diptych.losses import CrossEntropyLoss, OneOf
from tests.handlers.runs import Stop, stop_at
from tests.handlers.staged import (
    ALL,
    HEAD,
    loader,
    make_trainer,
    noted,
    plan_of,
)


def staged() -> tuple[Trainer, SeededLoader]:
    parts = {"a": CrossEntropyLoss(), "b": CrossEntropyLoss(label_smoothing=0.1)}
    trainer = make_trainer(
        Stage("head", trains="head", epochs=1, lr=0.1, metric="val/loss", mode="min"),
        Stage(
            "upper",
            trains=["head", "blocks"],
            steps=7,
            lr=0.1,
            weight_decay=0.1,
            layer_decay=0.5,
            schedule=LearningRate(warmup=2),
            batch_size=6,
            loss="b",
            load="best",
        ),
        Stage(
            "other", epochs=3, lr=0.01, loader=loader(14), metric="val/loss", patience=1, mode="max"
        ),
        Stage("all", steps=3, lr=0.01, optimizer_state="reset", settings={"model.drop.p": 0.4}),
        loss=OneOf(losses=parts),
    )
    trainer.attach(Evaluation(list(loader()), every=4))
    return trainer, loader()


@pytest.mark.parametrize("at", range(1, 20, 3))
def test_an_interruption_in_any_stage_changes_nothing(at):
    report = certify.interruption(staged, steps=20, at=at)
    assert report.passed, report


def requires_gradient(trainer: Trainer) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("killed_at", [3, 8, 12, 16])
def test_a_run_that_was_killed_in_a_stage_resumes_in_it(killed_at, tmp_path):
    whole, batches = staged()
    frozen = noted(whole, lambda: requires_gradient(whole))
    whole.run(batches)

    killed, batches = staged()
    killed.attach(CheckpointManager(tmp_path, every=1))
    stop_at(killed, killed_at)
    with pytest.raises(Stop):
        killed.run(batches)
    resumed, batches = staged()
    resumed.attach(CheckpointManager(tmp_path, every=1))
    again = noted(resumed, lambda: requires_gradient(resumed))
    resumed.run(batches)

    assert resumed.state.iteration == whole.state.iteration
    assert again == frozen[killed_at - 1 :]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert (
        resumed.optimizer.state_dict()["param_groups"]
        == (whole.optimizer.state_dict()["param_groups"])
    )
    assert resumed.metrics.get_history("val/loss") == whole.metrics.get_history("val/loss")


def test_a_checkpoint_of_another_plan_is_refused():
    plan = plan_of(make_trainer(HEAD, ALL))
    state = plan_of(make_trainer(HEAD)).state_dict()
    with pytest.raises(RuntimeError, match="must be the checkpoint's, head, got head, all"):
        plan.load_state_dict(state)


@pytest.mark.parametrize("total", [None, 20])
def test_a_stage_that_is_made_longer_keeps_the_length_of_its_schedule(total, tmp_path, caplog):
    def build(epochs: int, total: int | None = None) -> Trainer:
        schedule = LearningRate(warmup=0, decay="linear", total=total)
        stage = Stage("all", epochs=epochs, lr=0.1, schedule=schedule)
        return make_trainer(stage).attach(CheckpointManager(tmp_path))

    first = build(2)
    first.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda t: t.terminate())
    first.run(loader())
    trainer = build(4, total)
    rates = noted(trainer, lambda: trainer.optimizer.param_groups[0]["lr"])
    trainer.run(loader())
    length = 20 if total else 10
    expected = [0.1 * max(0, 1 - (t - 1) / length) for t in range(6, 21)]
    assert rates == pytest.approx(expected)
    said = "the schedule of the learning rate of stage all has 10 iterations"
    assert (said in caplog.text.lower()) == (total is None)
