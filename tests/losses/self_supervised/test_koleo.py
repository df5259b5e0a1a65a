"""KoLeo against a loop over all pairs."""

import math

import pytest
import torch

from diptych.losses import KoLeoLoss
from tests.losses.oracles import draw, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks


def expected_value(view: torch.Tensor) -> float:
    rows = [[x / math.hypot(*row) for x in row] for row in view.tolist()]
    nearest = [
        min(math.dist(a, b) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)
    ]
    return -mean(math.log(distance + 1e-8) for distance in nearest)


def test_value_is_that_of_the_loop_for_each_view_alone() -> None:
    views = draw(7, 3, 4)
    values = [expected_value(views[:, view]) for view in range(3)]
    assert math.isclose(float(KoLeoLoss()(views[:, 0])), values[0], rel_tol=1e-11)
    assert math.isclose(float(KoLeoLoss()(views)), mean(values), rel_tol=1e-11)
    assert math.isclose(float(KoLeoLoss()(views[:, :2], views[:, 2])), mean(values), rel_tol=1e-11)


def test_orthogonal_features_have_the_distance_root_two() -> None:
    assert math.isclose(float(KoLeoLoss()(5 * torch.eye(4))), -math.log(2) / 2, rel_tol=1e-6)


def test_neighbours_on_other_ranks_count(ranks: Ranks) -> None:
    views = draw(6, 2, 4)
    assert_same_on_ranks(ranks, KoLeoLoss, (views,), splits=[(5, 1), (0, 4, 2)])


def test_duplicates_have_a_finite_value_and_no_gradient() -> None:
    features = draw(2, 3).repeat(2, 1).requires_grad_()
    value = KoLeoLoss()(features)
    (gradient,) = torch.autograd.grad(value, features)
    assert value.isfinite()
    assert not gradient.any()


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="KoLeoLoss needs a global batch of at least 2, got 1"):
        KoLeoLoss()(torch.randn(1, 4))
