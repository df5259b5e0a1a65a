"""Checkpoint managers over two ranks: one start for all, one batch at which an evaluation ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events

from diptych.engine import SeededLoader, Trainer
from diptych.handlers import CheckpointManager, Evaluation
from tests.handlers.checkpointing.test_checkpoint_manager import digest
from tests.handlers.runs import make_trainer

EPOCHS = 3


class Killed(BaseException):
    """Imitates the end of the process."""


def loader_of(samples: int, *, shuffle: bool = True) -> SeededLoader:
    """Return a loader of batches of eight samples, four for each rank."""
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(samples))
    data = [{"image": row, "label": index % 2} for index, row in enumerate(x)]
    return SeededLoader(data, 8, shuffle=shuffle)


def build(folder: Path, every: Any = "epoch") -> tuple[Trainer, Evaluation, list[Path | None]]:
    """Return a trainer with two managers, its evaluation, and the batches that it evaluated."""
    trainer = make_trainer()
    evaluation = Evaluation(loader_of(88, shuffle=False), every=every)
    trainer.attach(
        evaluation,
        CheckpointManager(folder / "best", best="val/loss", mode="min", keep=1),
        CheckpointManager(folder / "last", every=2, keep=1),
    )
    evaluated: list[Any] = []
    evaluation.evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: evaluated.append(trainer.state.iteration)
    )
    return trainer, evaluation, evaluated


def best_of(trainer: Trainer) -> str | None:
    manager = next(h for h in trainer.handlers if isinstance(h, CheckpointManager))
    path = manager.get_best_checkpoint()
    return None if path is None else path.name


def whole_run(folder: Path, every: Any = "epoch") -> tuple[str, list[float], str | None]:
    trainer, _, _ = build(folder, every)
    trainer.run(loader_of(24), max_epochs=EPOCHS)
    return digest(trainer), trainer.metrics.get_history("val/loss"), best_of(trainer)


def killed_run(folder: Path, iteration: int) -> int:
    """Return the iteration at which a run that was killed starts again."""
    trainer, _, _ = build(folder)

    def kill() -> None:
        raise Killed

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=iteration), kill)
    try:
        trainer.run(loader_of(24), max_epochs=EPOCHS)
    except Killed:
        dist.barrier()
    return trainer.state.iteration


def resumed_run(folder: Path, every: Any = "epoch") -> tuple[int, tuple[Any, ...], list[int]]:
    started: list[int] = []
    trainer, _, evaluated = build(folder, every)
    trainer.add_event_handler(Events.STARTED, lambda: started.append(trainer.state.iteration))
    trainer.run(loader_of(24), max_epochs=EPOCHS)
    found = digest(trainer), trainer.metrics.get_history("val/loss"), best_of(trainer)
    return started[0], found, evaluated


def stopped_run(folder: Path, every: Any, iteration: int) -> tuple[int | None, list[int]]:
    """Send a signal to rank 1 in its second batch of an evaluation; return code and batches."""
    trainer, evaluation, evaluated = build(folder, every)

    @evaluation.evaluator.on(Events.ITERATION_COMPLETED)
    def stop() -> None:
        batches = evaluation.evaluator.state.iteration
        if (trainer.state.iteration, batches, dist.get_rank()) == (iteration, 2, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        trainer.run(loader_of(24), max_epochs=EPOCHS)
    except SystemExit as error:
        return error.code, evaluated  # type: ignore[return-value]
    return None, evaluated


@pytest.mark.parametrize(("killed", "start"), [(4, 3), (5, 4)])
def test_two_ranks_resume_from_the_newest_checkpoint_of_two_managers(
    ranks, tmp_path, killed, start
):
    expected = ranks.run(whole_run, [(tmp_path / "whole",)] * 2)
    assert expected[0] == expected[1]
    ranks.run(killed_run, [(tmp_path / "killed", killed)] * 2)
    found = ranks.run(resumed_run, [(tmp_path / "killed",)] * 2)
    assert [one[0] for one in found] == [start] * 2
    assert [one[1] for one in found] == expected


@pytest.mark.parametrize(("every", "iteration"), [("epoch", 3), ("epoch", 6), (2, 4)])
def test_a_signal_to_one_rank_ends_an_evaluation_on_both_at_one_batch(
    ranks, tmp_path, every, iteration
):
    expected = ranks.run(whole_run, [(tmp_path / "whole", every)] * 2)
    stopped = ranks.run(stopped_run, [(tmp_path / "cut", every, iteration)] * 2)
    assert [code for code, _ in stopped] == [143] * 2
    counts = [batches.count(iteration) for _, batches in stopped]
    assert counts[0] == counts[1] <= 4  # of 11
    found = ranks.run(resumed_run, [(tmp_path / "cut", every)] * 2)
    assert [one[0] for one in found] == [iteration] * 2
    assert [one[1] for one in found] == expected
    assert all(evaluated.count(iteration) == 11 for _, _, evaluated in found)
