"""Sizes that a trainer announces: no exchange inside a loss, the same values, and the checks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.losses.base import gather
from diptych.losses.base.gather import global_batch
from diptych.losses.contrastive.clip import CLIPLoss
from tests.losses.oracles import draw
from tests.losses.ranks import Ranks

SIZES = ((3, 2), (1, 4), (2, 0), (3, 2))
"""Samples by rank of four batches."""


@contextmanager
def counted_exchanges() -> Iterator[list[list[int]]]:
    """Record the numbers that this rank exchanges through host memory in a loss."""
    calls: list[list[int]] = []
    exchange = gather._exchange

    def counted(numbers: list[int]) -> list[list[int]]:
        calls.append(numbers)
        return exchange(numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "_exchange", counted)
        yield calls


def two_calls(loss: CLIPLoss, size: int, groups: Tensor | None = None) -> list[float]:
    """Return the values of two calls, as a loss of two parts makes them."""
    return [float(loss(draw(size, 4), draw(size, 4, seed=k), groups).detach()) for k in (1, 2)]


def announce_on_rank() -> dict[str, object]:
    rank, loss, plain, found = dist.get_rank(), CLIPLoss(), CLIPLoss(), []
    with counted_exchanges() as calls:
        for sizes in SIZES:
            with loss.announce(sizes[rank], kind=7):
                found.append(two_calls(loss, sizes[rank]))
        first = len(calls)
        with loss.announce(3, kind=7 if rank else 8):  # a new structure on one of the ranks
            two_calls(loss, 3)
        changed = len(calls)
    return {
        "equal": found == [two_calls(plain, sizes[rank]) for sizes in SIZES],
        "exchanges": (first, changed),
    }


def test_only_the_first_call_for_batches_of_one_structure_exchanges(ranks: Ranks) -> None:
    expected = {"equal": True, "exchanges": (2, 4)}
    assert ranks.run(announce_on_rank, [(), ()]) == [expected] * 2


def disagree_on_rank() -> list[str]:
    rank, loss, errors = dist.get_rank(), CLIPLoss(), []
    with loss.announce(2, kind=1):
        two_calls(loss, 2)
    groups = torch.tensor([0, 0]) if rank else None  # so the batch has one more key
    with (
        loss.announce(2, kind=2 if rank else 1),
        pytest.raises(ValueError, match="on all") as found,
    ):
        two_calls(loss, 2, groups)
    errors.append(str(found.value))
    with loss.announce(2, kind=1), pytest.raises(ValueError, match="one row for each") as found:
        global_batch(3, feature_dimension=4, groups_given=0)
    return [*errors, str(found.value)]


def test_ranks_that_disagree_after_agreeing_all_raise(ranks: Ranks) -> None:
    for agreement, rows in ranks.run(disagree_on_rank, [(), ()]):
        assert agreement == "groups_given must be equal on all ranks, got [0, 1] by rank"
        assert rows == (
            "a loss must get one row for each of the 2 samples of the batch, as before, got 3."
            " Return as many rows from the task each time."
        )


def other_rows_on_rank() -> tuple[int, list[tuple[int, ...]]]:
    rank, loss = dist.get_rank(), CLIPLoss()
    found = []
    with counted_exchanges() as calls:
        for captions in ((2, 1), (5, 4)):  # rows of the loss, of two samples on each rank
            with loss.announce(2, kind=1):
                found.append(global_batch(captions[rank]).sizes)
    return len(calls), found


def test_a_loss_of_other_rows_than_the_batch_exchanges_in_each_call(ranks: Ranks) -> None:
    assert ranks.run(other_rows_on_rank, [(), ()]) == [(2, [(2, 1), (5, 4)])] * 2


def train_on_rank(microbatch_size: int | None) -> tuple[int, list[float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ignite's own
        from diptych.engine import Trainer

    rank = dist.get_rank()
    batches = [{"x": draw(sizes[rank], 4)} for sizes in ((3, 2), (1, 4), (4, 3))]
    torch.manual_seed(0)
    model = nn.Linear(4, 4, dtype=torch.float64)

    def task(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"first": model(batch["x"]), "second": batch["x"]}

    loss = CLIPLoss(learn_temperature=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, loss, optimizer, task=task, microbatch_size=microbatch_size, device="cpu"
    )
    with counted_exchanges() as calls:
        trainer.run(batches, max_epochs=2)
    return len(calls), model.weight.flatten().tolist()


@pytest.mark.slow
def test_a_trainer_announces_the_sizes(ranks: Ranks) -> None:
    (whole, weights), _ = ranks.run(train_on_rank, [(None,)] * 2)
    (pieces, same), _ = ranks.run(train_on_rank, [(2,)] * 2)
    assert (whole, pieces) == (1, 1)
    assert same == pytest.approx(weights, rel=1e-10)
