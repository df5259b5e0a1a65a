"""Random managers, killed at random instants: the run ends as the uninterrupted one does."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Events

from diptych.engine import EvaluationEvents, MetricsEvents, RunEvents, StepEvents, Trainer
from diptych.handlers import CheckpointManager, EarlyStopping, Evaluation, JsonLines
from tests.handlers.checkpointing.test_checkpoint_manager import digest, make_loader, make_trainer

EPOCHS = 3
MANAGERS: list[dict[str, Any]] = [
    {"best": "val/loss", "mode": "min"},
    {"best": "own/score"},
    {"every": 4},
    {"every": 1},
    {"every": "epoch"},
    {"every": 100},
]
INSTANTS = [
    *(RunEvents.SAVED,) * 4,
    Events.ITERATION_STARTED,
    StepEvents.OPTIMIZER_STEPPED,
    Events.ITERATION_COMPLETED,
    RunEvents.SAFE_POINT,
    MetricsEvents.LOGGED,
    Events.EPOCH_COMPLETED,
    EvaluationEvents.BATCH_EVALUATED,
    EvaluationEvents.EVALUATED,
    MetricsEvents.EPOCH_PUBLISHED,
    Events.COMPLETED,
]


class Killed(BaseException):
    """Imitates the end of the process."""


def build(folder: Path, chosen: list[dict[str, Any]], every: Any) -> Trainer:
    """Return a trainer with an evaluation, a value of its own, a log and managers."""
    trainer = make_trainer()
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda: trainer.metrics.update({"own/score": -abs(trainer.state.epoch - 2.0)}),
    )
    trainer.add_event_handler(
        Events.COMPLETED, lambda: trainer.metrics.update({"own/end": trainer.state.iteration})
    )
    trainer.attach(
        JsonLines(folder),
        *(
            CheckpointManager(folder / str(number), keep=1, **one)
            for number, one in enumerate(chosen)
        ),
        EarlyStopping(metric="val/loss", mode="min", patience=50),
        Evaluation(make_loader(seed=5), every=every),
    )
    return trainer


def result(folder: Path, trainer: Trainer) -> Any:
    """Return everything that a kill could change."""
    best = []
    for manager in (h for h in trainer.handlers if isinstance(h, CheckpointManager)):
        entries = json.loads((manager.directory / "manifest.json").read_text())["checkpoints"]
        path = manager.get_best_checkpoint()
        held = [e for e in entries if path is not None and e["file"] == path.name]
        best.append([(e["iteration"], e["score"]) for e in held])
    history = trainer.metrics.state_dict()["history"]
    return digest(trainer), (folder / "metrics.jsonl").read_bytes(), history, best


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 40))]
)
def test_killed_twice_at_random_instants_it_ends_like_the_uninterrupted_run(tmp_path, seed):
    draw = random.Random(seed)
    chosen = draw.sample(MANAGERS, draw.choice([1, 2, 2, 3]))
    chosen = [{**one, "background": draw.random() < 0.3} for one in chosen]
    every, limit = draw.choice(["epoch", "epoch", 4]), draw.choice(["max_epochs", "max_iters"])
    limits = {"max_epochs": EPOCHS} if limit == "max_epochs" else {"max_iters": 16}
    whole = build(tmp_path / "whole", chosen, every)
    whole.run(make_loader(), **limits)
    for _ in range(2):
        cut = build(tmp_path / "cut", chosen, every)
        event, time = draw.choice(INSTANTS), draw.randint(1, 8)
        fired = []

        def kill(*_: object, fired: list[int] = fired, time: int = time) -> None:
            fired.append(1)
            if len(fired) == time:
                raise Killed

        cut.add_event_handler(event, kill)
        with contextlib.suppress(Killed):
            cut.run(make_loader(), **limits)
    last = build(tmp_path / "cut", chosen, every)
    last.run(make_loader(), **limits)
    assert result(tmp_path / "cut", last) == result(tmp_path / "whole", whole)
