"""A stop signal during an evaluation: it takes effect at the next batch, and nothing is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Accuracy
from torch import Tensor, nn

from diptych.engine import SeededLoader, Trainer
from diptych.handlers import CheckpointManager, EarlyStopping, Evaluation, JsonLines, WeightAverage
from tests.handlers.runs import classifier

Batch = dict[str, Tensor]
STOP_AT = 2  # batches of the evaluation


def samples(count: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 4, generator=generator)
    return [{"image": image, "label": torch.tensor(i % 3)} for i, image in enumerate(images)]


class Job:
    """A run with two evaluations and functions around them.

    Args:
        folder: of the run.
        every: the cadence of the evaluations.
        stop: the number of the evaluation (over both) in which a signal arrives; None: in none.
    """

    def __init__(self, folder: Path, every: Any, stop: int | None) -> None:
        self.batches: list[int] = []  # of each evaluation that has begun
        self.noted: list[tuple[str, int]] = []
        self.stop = stop
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        self.trainer = classifier(model, optimizer, seed=0, log_every=2)
        self.loader = SeededLoader(samples(20, 0), 4)
        held_out = SeededLoader(samples(20, 1), 4, shuffle=False)
        self.trainer.attach(WeightAverage(decay=0.5))
        self.note("before")
        for prefix in ("val", "second"):
            evaluation = Evaluation(
                held_out, metrics=[Accuracy()], every=every, prefix=prefix, at_start=True
            )
            self.trainer.attach(evaluation)
            evaluation.evaluator.add_event_handler(Events.EPOCH_STARTED, self.begin)
            evaluation.evaluator.add_event_handler(Events.ITERATION_STARTED, self.count)
            self.note(f"after {prefix}")
        self.trainer.attach(
            EarlyStopping(metric="val/loss", mode="min", patience=50),
            JsonLines(folder),
            CheckpointManager(folder / "checkpoints", best="val/accuracy"),
        )

    def note(self, name: str) -> None:
        """Add a function that publishes a value at the end of each epoch."""

        def publish(trainer: Trainer) -> None:
            self.noted.append((name, trainer.state.iteration))
            trainer.metrics.update({f"own/{name}": float(trainer.state.epoch)})

        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, publish)

    def begin(self) -> None:
        self.batches.append(0)

    def count(self) -> None:
        self.batches[-1] += 1
        if (len(self.batches) - 1, self.batches[-1]) == (self.stop, STOP_AT):
            os.kill(os.getpid(), signal.SIGINT)

    def run(self, **limits: int) -> None:
        self.trainer.run(self.loader, **limits)


@pytest.mark.parametrize("stop", range(6))
@pytest.mark.parametrize(
    ("every", "limits"),
    [("epoch", {"max_epochs": 2}), (3, {"max_epochs": 2}), ("epoch", {"max_iters": 8})],
    ids=["each epoch", "every 3 iterations", "an epoch that is cut"],
)
def test_the_evaluation_is_left_and_repeated_and_the_values_are_those_of_an_uninterrupted_run(
    every, limits, stop, tmp_path
):
    whole = Job(tmp_path / "whole", every, None)
    whole.run(**limits)
    cut = Job(tmp_path / "cut", every, stop)
    with pytest.raises(KeyboardInterrupt):
        cut.run(**limits)
    assert cut.batches[-1] == STOP_AT  # left at the batch in which the signal arrived
    assert len(cut.batches) == stop + 1
    resumed = Job(tmp_path / "cut", every, None)
    resumed.run(**limits)
    assert cut.noted + resumed.noted == whole.noted
    histories = [job.trainer.metrics.state_dict()["history"] for job in (whole, resumed)]
    assert histories[1] == histories[0]
    for name, value in whole.trainer.model.state_dict().items():
        assert torch.equal(resumed.trainer.model.state_dict()[name], value), name
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert lines[0] == lines[1]
    repeated = len(cut.batches) + len(resumed.batches) - len(whole.batches)
    assert repeated <= (1 if every == "epoch" and stop > 1 else 2)  # 2: all of one iteration
