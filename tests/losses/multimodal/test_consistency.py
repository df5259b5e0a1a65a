"""ConsistencyLoss against plain loops."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from diptych.losses import ConsistencyLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import Row, cosine, draw, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

DISTANCES = ("cosine", "l2", "l1", "smooth_l1")


def distance(kind: str, f: Row, r: Row) -> float:
    """Return the distance of two vectors, by its definition."""
    if kind == "cosine":
        return 1 - cosine(f, r)
    gaps = [abs(a - b) for a, b in zip(f, r, strict=True)]
    if kind == "l2":
        return math.sqrt(math.fsum(gap * gap for gap in gaps))
    if kind == "l1":
        return math.fsum(gaps)
    return math.fsum(gap * gap / 2 if gap < 1 else gap - 0.5 for gap in gaps)


def unit(row: Row) -> Row:
    norm = math.sqrt(math.fsum(x * x for x in row))
    return [x / norm for x in row]


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("normalize", [True, False])
def test_value_is_the_mean_distance(kind: str, normalize: bool) -> None:
    features, reference = 2 * draw(6, 5), 2 * draw(6, 5, seed=1)
    rows = list(zip(features.tolist(), reference.tolist(), strict=True))
    if normalize:
        rows = [(unit(f), unit(r)) for f, r in rows]

    value = ConsistencyLoss(distance=kind, normalize=normalize)(features, reference)

    assert float(value) == pytest.approx(mean(distance(kind, f, r) for f, r in rows), rel=1e-13)


@pytest.mark.parametrize("kind", DISTANCES)
def test_equal_features_give_zero_and_a_finite_gradient(kind: str) -> None:
    features = draw(6, 5).requires_grad_()

    value = ConsistencyLoss(distance=kind)(features, features.detach().clone())
    value.backward()

    assert float(value.detach()) == pytest.approx(0, abs=1e-15)
    assert float(features.grad.abs().max()) < 0.5


def test_the_reference_gets_no_gradient() -> None:
    features, reference = draw(6, 5).requires_grad_(), draw(6, 5, seed=1).requires_grad_()

    ConsistencyLoss()(features, reference).backward()

    assert features.grad is not None
    assert reference.grad is None


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("normalize", [True, False])
def test_every_form_keeps_the_contract(kind: str, normalize: bool) -> None:
    check_loss(lambda: ConsistencyLoss(distance=kind, normalize=normalize))


def test_groups_have_no_effect() -> None:
    features, reference, loss = draw(6, 5), draw(6, 5, seed=1), ConsistencyLoss()

    grouped = loss(features, reference, torch.tensor([0, 0, 1, 1, 2, 2]))

    assert torch.equal(grouped, loss(features, reference))


@pytest.mark.parametrize("kind", DISTANCES)
def test_every_distance_is_the_same_on_ranks(kind: str, ranks: Ranks) -> None:
    build = partial(ConsistencyLoss, distance=kind, normalize=False)

    assert_same_on_ranks(ranks, build, (draw(6, 8), draw(6, 8, seed=1)))


def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="distance must be one of 'cosine', 'l2', 'l1'"):
        ConsistencyLoss(distance="euclid")
