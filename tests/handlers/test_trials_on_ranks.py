"""Dry runs, overfitting and checks of the first batch over two ranks."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diptych.engine import BatchError, SeededLoader, Trainer
from diptych.engine.distributed.collectives import rank
from diptych.engine.state.run_state import run_state
from diptych.handlers import CheckpointManager, Evaluation, JsonLines, KNNAccuracy
from tests.handlers.runs import classifier
from tests.losses.ranks import Ranks

Batch = dict[str, Tensor]


def local_part(value: Any) -> Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def samples(count: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 4, generator=generator)
    return [{"image": image, "label": torch.tensor(i % 3)} for i, image in enumerate(images)]


def batches(sizes: list[int], seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"image": torch.randn(n, 4, generator=generator), "label": torch.arange(n) % 3}
        for n in sizes
    ]


def make_trainer(*, shard: bool = False) -> Trainer:
    os.environ["LOCAL_RANK"] = str(rank())  # Ignite's metrics warn without it
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return classifier(model, optimizer, seed=0, shard=shard)


def weights_of(trainer: Trainer) -> Batch:
    state = trainer.model.state_dict()
    return {name: local_part(value).clone() for name, value in state.items()}


def dry_run_on_a_rank(folder: str, shard: bool) -> dict[str, Any]:
    trainer, loader = make_trainer(shard=shard), SeededLoader(samples(24), 8)
    held_out = batches([3, 2], seed=5 + rank())
    trainer.attach(
        Evaluation(held_out, metrics=[Accuracy()]), JsonLines(folder), CheckpointManager(folder)
    )
    trainer.run(loader, max_epochs=1)
    before = weights_of(trainer)
    position, files = run_state(trainer)["trainer"], sorted(p.name for p in Path(folder).iterdir())
    report, found = trainer.dry_run(loader), trainer.overfit(loader, updates=5)
    after = weights_of(trainer)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert run_state(trainer)["trainer"] == position
    assert sorted(p.name for p in Path(folder).iterdir()) == files
    trainer.run(loader, max_epochs=2)
    return {"values": report.values, "losses": found.losses, "weights": weights_of(trainer)}


def plain_run_on_a_rank(folder: str, shard: bool) -> Batch:
    trainer, loader = make_trainer(shard=shard), SeededLoader(samples(24), 8)
    trainer.attach(JsonLines(folder), CheckpointManager(folder))
    trainer.run(loader, max_epochs=1)
    trainer.run(loader, max_epochs=2)
    return weights_of(trainer)


@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_a_dry_run_over_ranks_leaves_no_trace(ranks: Ranks, tmp_path, shard):
    results = ranks.run(dry_run_on_a_rank, [(str(tmp_path / "dry"), shard)] * 2)
    plain = ranks.run(plain_run_on_a_rank, [(str(tmp_path / "plain"), shard)] * 2)
    for result, weights in zip(results, plain, strict=True):
        assert all(torch.equal(result["weights"][name], value) for name, value in weights.items())
        assert {"train/loss", "val/loss"} <= set(result["values"])
        assert len(result["losses"]) == 5


def checked_on_a_rank(sizes: list[int], probe: bool) -> str:
    trainer = make_trainer()
    own = DataLoader(batches(sizes, seed=7 + rank()), batch_size=None)

    def labelled(model: nn.Module, batch: Batch) -> Batch:
        return {"features": model(batch["image"]), "labels": batch["label"]}

    if probe:
        evaluation = Evaluation(own, metrics=[KNNAccuracy(own, k=2)], task=labelled)
    else:
        evaluation = Evaluation(own, metrics=[Accuracy()])
    trainer.attach(evaluation)
    try:
        trainer.run(SeededLoader(samples(8), 4), max_epochs=1)
    except BatchError as error:
        assert trainer.state.iteration == 0
        return str(error)
    return ""


def test_a_rank_without_a_batch_is_reported_on_all_ranks_when_the_run_starts(ranks: Ranks):
    for found in ranks.run(checked_on_a_rank, [([3], False), ([], False)]):
        assert "must have a batch on every rank, got [1, 0] batches" in found


def test_ranks_with_different_numbers_of_batches_pass_the_check(ranks: Ranks):
    for probe in (False, True):
        assert ranks.run(checked_on_a_rank, [([3, 3], probe), ([2], probe)]) == ["", ""]


def stopped_on_a_rank(folder: str, sizes: list[int], stopped: int, at: int) -> list[int]:
    """Run with a signal on one rank in the second evaluation; return the evaluated batches."""
    trainer, seen = make_trainer(), [0]
    evaluation = Evaluation(batches(sizes, seed=3 + rank()), metrics=[Accuracy()])
    trainer.attach(evaluation, CheckpointManager(folder))
    evaluation.evaluator.add_event_handler(Events.EPOCH_STARTED, lambda: seen.append(0))

    @evaluation.evaluator.on(Events.ITERATION_COMPLETED)
    def count() -> None:
        seen[-1] += 1
        if rank() == stopped and len(seen) == 3 and seen[-1] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(SystemExit):
        trainer.run(SeededLoader(samples(8), 4), max_epochs=3)
    return seen[1:]


def test_all_ranks_leave_an_evaluation_when_one_gets_a_signal_and_repeat_it(ranks: Ranks, tmp_path):
    for index, sizes in enumerate(([2] * 6, [2] * 9)):  # equal, and uneven shards
        folder = str(tmp_path / str(index))
        arguments = [(folder, [2] * 6, 1, 2), (folder, sizes, 1, 2)]
        for seen in ranks.run(stopped_on_a_rank, arguments):
            assert len(seen) == 2
            assert seen[1] <= 4  # the ranks agree one batch later
        first, second = ranks.run(stopped_on_a_rank, [(a, b, -1, 0) for a, b, *_ in arguments])
        assert (first, second) == ([6, 6], [len(sizes)] * 2)  # the second evaluation, and a third
