"""Two ranks: loss and gradients of one global batch, whatever the pieces on each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.engine import tasks
from diptych.engine.data.batches import split_batch
from tests.engine import ranks
from tests.engine.models import (
    CoupledLoss,
    SquareLoss,
    TokenLoss,
    copied_gradients,
    plain_gradients,
    relative_error,
)

pytestmark = pytest.mark.xdist_group("collectives")  # its processes start once, on one worker

EXACT = 1e-10


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return what each of two processes found."""
    return request.getfixturevalue("ranks").run(ranks.results, [()] * ranks.RANKS)


ALONE = {"pairs": CoupledLoss, "tokens": TokenLoss, "squares": SquareLoss}
"""The loss of one process for each case."""


@pytest.mark.parametrize("size", ranks.SIZES)
@pytest.mark.parametrize("name", ranks.CASES)
def test_two_ranks_take_the_gradient_of_the_global_batch(found, name: str, size: int | None):
    model, _, task, batch = ranks.CASES[name]
    expected = plain_gradients(ranks.made(model), ranks.made(ALONE[name]), [batch()], task=task)
    for rank in found:
        assert relative_error(rank[f"{name} {size}"]["gradients"], expected) < EXACT


def test_a_frozen_tower_changes_nothing_for_the_other(found):
    model, _, task, batch = ranks.FROZEN
    expected = plain_gradients(ranks.made(model), ranks.made(CoupledLoss), [batch()], task=task)
    for rank in found:
        assert relative_error(rank["frozen 2"]["gradients"], expected) < EXACT


def test_a_tower_that_is_thawed_between_two_updates_trains_from_then_on(found):
    model = ranks.made(ranks.TwoTower)
    expected = plain_gradients(model, ranks.made(CoupledLoss), [ranks.pairs()])
    for rank in found:
        assert relative_error(rank["thawed"]["gradients"], expected) < EXACT


def test_parameters_that_a_loss_does_not_reach_hold_nothing_up(found):
    model = ranks.made(ranks.TwoTower)
    expected = plain_gradients(model, ranks.made(CoupledLoss), [ranks.pairs()])
    for rank in found:
        strays = rank["strays"]
        assert strays["never"] is None
        assert strays["sometimes"].isfinite()
        assert strays["sometimes"] != 0
        towers = {n: g for n, g in strays["gradients"].items() if n in expected}
        assert relative_error(towers, expected) < EXACT
    assert found[0]["strays"]["sometimes"].equal(found[1]["strays"]["sometimes"])


def test_a_layer_that_is_sent_back_twice_is_averaged_once_it_is_complete(found):
    class Twice(ranks.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, loss = ranks.made(Twice), ranks.made(SquareLoss)
    expected = plain_gradients(model, loss, [ranks.labelled()], task=tasks.classification)
    for rank in found:
        assert relative_error(rank["recomputed"]["gradients"], expected) < EXACT


def test_ranks_whose_loaders_differ_in_length_are_told_so_before_they_wait(found):
    for each in found:
        told = each["other lengths"]["error"]
        assert "the length of an epoch must be the same on all ranks" in told
        assert "got 2 on rank 0 and 3 on rank 1" in told


def test_ranks_that_publish_different_tags_are_told_so_on_all_of_them(found):
    for rank in found:
        assert "got tags train/0 on rank 0 and train/1 on rank 1" in rank["other tags"]["error"]


@pytest.mark.parametrize("size", ranks.SIZES)
def test_every_rank_begins_an_update_with_the_first_ranks_buffers_in_both_passes(found, size):
    model, loss = ranks.made(ranks.running_scale), ranks.made(CoupledLoss)
    first, second = ranks.shares(ranks.pairs())
    pieces = [split_batch(share, size or len(share["image"])) for share in (first, second)]
    with torch.no_grad():  # the first update, on the first rank
        for piece in pieces[0]:
            tasks.image_text(model, piece)
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    features: list[list[Tensor]] = []
    for own in pieces:
        for name, buffer in model.named_buffers():
            buffer.detach().copy_(start[name])
        features += [list(tasks.image_text(model, piece).values()) for piece in own]
    loss(*map(torch.cat, zip(*features, strict=True))).backward()
    for rank in found:
        gradients = rank[f"buffers {size}"]["gradients"]
        assert relative_error(gradients, copied_gradients(model, loss)) < EXACT


@pytest.mark.parametrize("size", ranks.SIZES)
@pytest.mark.parametrize("name", ranks.CASES)
def test_the_ranks_stay_equal_bit_for_bit(found, name: str, size: int | None):
    first, second = (rank[f"{name} {size}"]["weights"] for rank in found)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_records_hold_the_means_over_both_ranks(found):
    both = zip(*(rank["logged"]["losses"] for rank in found), strict=True)
    losses = [sum(values) / ranks.RANKS for values in both]
    expected = [(losses[0] + losses[1]) / 2, losses[2]]
    for rank in found:
        records = rank["logged"]["records"]
        assert [record["train/loss"] for record in records] == pytest.approx(expected)
    assert found[0]["logged"]["losses"] != found[1]["logged"]["losses"]


def test_the_first_ranks_parameters_are_everyones(found):
    first, second = (rank["apart"]["weights"] for rank in found)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_a_model_with_batch_norm_may_run_twice_in_an_update(found):
    assert relative_error(found[0]["crops"]["gradients"], found[1]["crops"]["gradients"]) < EXACT
