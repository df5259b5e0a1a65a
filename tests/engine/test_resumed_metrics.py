"""Published values and Ignite's metrics are those of one run, though it was cut and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ignite.engine import Events
from ignite.metrics import Loss, RunningAverage
from torch.nn.functional import cross_entropy

from diptych.engine import Trainer
from diptych.handlers import CheckpointManager, JsonLines, read_records
from tests.engine.state.scripts import EPOCH, Script

Attach = Callable[[Trainer], object]


def run(folder: Path, attach: Attach, stop: int | None = None) -> Trainer:
    trainer = Script(arguments={"log_every": 3}).build()
    attach(trainer)
    trainer.attach(JsonLines(folder), CheckpointManager(folder / "checkpoints"))
    if stop is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), trainer.terminate)
    trainer.run(Script().data(), max_epochs=2)
    return trainer


def records(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [
        (record.step, {k: v for k, v in record.values.items() if not k.startswith("time/")})
        for record in read_records(folder)
    ]


def test_a_run_that_stopped_between_two_log_points_logs_all_of_its_losses(tmp_path: Path):
    whole = run(tmp_path / "whole", lambda _: None)
    run(tmp_path / "cut", lambda _: None, stop=EPOCH + 1)
    resumed = run(tmp_path / "cut", lambda _: None)

    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert resumed.metrics.get_history("train/loss") == whole.metrics.get_history("train/loss")


def of_losses(trainer: Trainer, usage: str) -> RunningAverage:
    mean = RunningAverage(output_transform=lambda output: float(output.loss), alpha=0.5)
    mean.attach(trainer, "mean", usage)
    return mean


def of_a_metric(trainer: Trainer, usage: str) -> RunningAverage:
    loss = Loss(cross_entropy, output_transform=lambda _: tuple(trainer.outputs.values())[:2])
    mean = RunningAverage(loss, alpha=0.5)
    mean.attach(trainer, "mean", usage)
    return mean


@pytest.mark.parametrize(
    ("make", "usage"), [(of_losses, "running_batch_wise"), (of_a_metric, "running_epoch_wise")]
)
def test_a_running_mean_of_ignite_continues_after_a_resume(
    make: Callable[[Trainer, str], RunningAverage], usage: str, tmp_path: Path
):
    means: list[RunningAverage] = []

    def attach(trainer: Trainer) -> None:
        means.append(make(trainer, usage))

    whole = run(tmp_path / "whole", attach)
    run(tmp_path / "cut", attach, stop=EPOCH + 1)
    resumed = run(tmp_path / "cut", attach)

    assert resumed.state.metrics["mean"] == whole.state.metrics["mean"]
    assert means[2].compute() == means[0].compute()


def test_a_running_mean_of_ignite_starts_anew_with_a_new_run():
    trainer = Script().build()
    mean = of_losses(trainer, "running_batch_wise")
    trainer.run(Script().data(), max_epochs=1)
    trainer.state.max_epochs = None
    seen: list[object] = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda _: seen.append(mean.compute()))
    trainer.run(Script().data(), max_epochs=1)

    assert seen == [None]
