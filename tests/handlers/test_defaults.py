"""The default handlers together: the files of a run, unchanged values, and the cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine import StepEvents, StepOutput, Trainer
from diptych.handlers import (
    CheckpointManager,
    EarlyStopping,
    Evaluation,
    Stage,
    default_handlers,
    read_records,
)
from tests.handlers.runs import kept_records, loader, make_trainer, report_each_epoch
from tests.python_calls import calls

LOG_POINTS = 20
"""At which the cost is measured: beyond them, only the start and the end of a run."""

MORE_CALLS = {"an iteration": 24, "a log point": 900}
"""Python calls beyond those of a trainer without handlers: of an iteration, and of ten with a log
point. They were 20 and 783 when this was written."""


def run(folder: Path | None, epochs: int = 2, **options: object) -> Trainer:
    trainer = make_trainer()
    report_each_epoch(trainer, 0.5, 0.25, 0.75)
    if folder is not None:
        trainer.attach(*default_handlers(folder, **options))
    trainer.run(loader(), max_epochs=epochs)
    return trainer


def test_a_run_directory_holds_all_files_of_the_run(tmp_path):
    run(tmp_path, best="val/recall@1")

    names = {path.name for path in tmp_path.iterdir()}
    (events,) = [name for name in names if name.startswith("events.out.tfevents")]
    assert names - {events} == {
        "checkpoints",
        "identity.json",
        "metrics.digest.json",
        "metrics.jsonl",
        "metrics.measured.jsonl",
        "report.html",
        "settings.json",
    }


def test_the_same_command_continues_the_run(tmp_path):
    run(tmp_path, epochs=1)

    trainer = run(tmp_path, epochs=2)

    assert trainer.state.iteration == 12
    assert [r.step for r in read_records(tmp_path)] == [4, 6, 6, 8, 12, 12]


def test_attaching_them_changes_no_value(tmp_path):
    bare, watched = make_trainer(), make_trainer()
    watched.attach(*default_handlers(tmp_path))
    values = [kept_records(bare), kept_records(watched)]

    for trainer in (bare, watched):
        trainer.run(loader(), max_epochs=3)

    assert all(
        torch.equal(a, b)
        for a, b in zip(bare.model.parameters(), watched.model.parameters(), strict=True)
    )
    for expected, record in zip(*values, strict=True):
        assert {t: v for t, v in record.values.items() if t in expected.values} == expected.values
        own = ("time/", "health/", "gradients/")
        assert all(t in expected.values or t.startswith(own) for t in record.values)


class Towers(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(3, width)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image = batch["image"] + torch.arange(3)
        return {"first_features": self.first(image), "second_features": self.second(image)}


def distance(first: Tensor, second: Tensor) -> Tensor:
    return (first.mean(1) - second.mean(1)).square().mean()


@pytest.mark.parametrize(
    ("width", "health"),
    [(4, True), (5, True), (4, False)],
    ids=["pairs of features", "no such pair", "health=False"],
)
def test_they_measure_features_that_fit_and_gradients_at_log_points(width, health, tmp_path):
    model = Towers(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.Module()
    loss.forward = distance
    trainer = Trainer(model, loss, optimizer, task=lambda m, b: m(b), device="cpu", log_every=3)
    trainer.attach(*default_handlers(tmp_path, health=health))
    records = kept_records(trainer)
    trainer.run(loader(), max_iters=6)

    for record, size in zip(records[:2], (2, 1), strict=True):
        assert ("gradients/norm/second" in record.values) == health
        assert ("health/first/rankme" in record.values) == (health and width == 4)
        for tag in ("health/first/spread", "health/first/uniformity", "health/auroc"):
            # One sample has nothing to be compared with: it is no sign of a collapse.
            assert (tag in record.values) == (health and width == 4 and size > 1)


def test_the_options_of_checkpoints_are_passed_on(tmp_path):
    run(tmp_path, epochs=3, best="val/recall@1", keep=1)

    (manager,) = [h for h in default_handlers(tmp_path) if isinstance(h, CheckpointManager)]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    assert kept == ["checkpoint_epoch_3.pt"]
    assert manager.directory == tmp_path / "checkpoints"


def test_a_wrong_option_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every must be"):
        default_handlers(tmp_path, every=0)


def no_op_trainer(log_every: int) -> Trainer:
    scalars = {f"train/{name}": torch.zeros(()) for name in ("loss", "a", "b", "c", "d")}
    output = StepOutput(scalars["train/loss"], {}, 1)

    def step(trainer: Trainer, _: int) -> StepOutput:
        for event in StepEvents:
            trainer.fire_event(event)
        trainer.metrics.update(scalars)
        return output

    return make_trainer(log_every=log_every, step=step)


@pytest.mark.parametrize(("what", "log_every"), [("an iteration", 1000), ("a log point", 10)])
def test_they_make_few_python_calls(what, log_every, tmp_path):
    def calls_of(iterations: int, *handlers: object) -> int:
        trainer = no_op_trainer(log_every).attach(*handlers)
        return calls(lambda: trainer.run([0] * iterations))

    counts = []
    for turn, iterations in enumerate((10, 10, 10 + 10 * LOG_POINTS)):  # the first one imports
        handlers = default_handlers(tmp_path / str(turn), every=10**6)
        counts.append(calls_of(iterations, *handlers) - calls_of(iterations))
    more = (counts[2] - counts[1]) / (LOG_POINTS if log_every == 10 else 10 * LOG_POINTS)
    assert more < MORE_CALLS[what]


@pytest.mark.parametrize("best", [None, "train/loss", "val/loss", "own/score"])
@pytest.mark.parametrize("every", ["epoch", 1000])
def test_a_trial_of_five_iterations_ends_without_an_error(best, every, tmp_path):
    trainer = make_trainer()
    if best == "own/score":
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda t: t.metrics.update({"own/score": 1.0})
        )
    trainer.attach(
        Evaluation(loader(), every=every),
        EarlyStopping(metric=best or "train/loss"),
        *default_handlers(tmp_path, best=best),
    )
    trainer.run(loader(), max_iters=5)
    assert trainer.state.iteration == 5
    manager = trainer.handlers_of(CheckpointManager)[0]
    assert manager.get_latest_checkpoint() is not None
    ranked = manager.get_best_checkpoint()
    assert (ranked is not None) == (best == "val/loss" and every == "epoch")


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("val/loss", "min"),
        ("train/contrastive_loss", "min"),
        ("val/image_to_text/mean_rank", "min"),
        ("val/recall@1", "max"),
        ("health/image/effective_rank", "max"),
    ],
)
def test_a_smaller_loss_is_better_unless_the_script_says_otherwise(tmp_path, metric, mode):
    stage = Stage("all", epochs=1, lr=0.1, metric=metric)
    handlers = [EarlyStopping(metric=metric), *default_handlers(tmp_path, best=metric)]
    modes = {type(one).__name__: one.mode for one in (stage, *handlers) if hasattr(one, "mode")}
    assert modes == dict.fromkeys(("Stage", "EarlyStopping", "RunCard", "CheckpointManager"), mode)
    assert EarlyStopping(metric=metric, mode="max").mode == "max"
