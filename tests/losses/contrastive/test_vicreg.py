"""VICReg: its three terms, against plain loops."""

import itertools
import math

import pytest
import torch

from diptych.losses import VICRegLoss
from tests.losses.oracles import covariance, draw, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

FIRST, SECOND = 0.7 * draw(6, 4), 0.7 * draw(6, 4, seed=1) + 3


def expected_terms(epsilon: float) -> dict[str, float]:
    pairs = zip(FIRST.flatten().tolist(), SECOND.flatten().tolist(), strict=True)
    terms = {"invariance": mean((a - b) ** 2 for a, b in pairs), "variance": 0.0, "covariance": 0.0}
    for side in (FIRST, SECOND):
        matrix = covariance(side.tolist(), ddof=1)
        terms["variance"] += 0.5 * mean(
            max(0.0, 1 - math.sqrt(matrix[d][d] + epsilon)) for d in range(4)
        )
        terms["covariance"] += sum(
            matrix[i][j] ** 2 / 4 for i in range(4) for j in range(4) if i != j
        )
    return terms


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (0.0, 2.0, 0.5)])
@pytest.mark.parametrize("epsilon", [1e-4, 0.1])
def test_terms_are_those_of_the_loop(epsilon: float, weights: tuple[float, ...]) -> None:
    names = ("invariance", "variance", "covariance")
    arguments = {f"{name}_weight": weight for name, weight in zip(names, weights, strict=True)}
    loss = VICRegLoss(epsilon=epsilon, **arguments)
    expected = expected_terms(epsilon)
    terms = loss.terms(FIRST, SECOND)
    assert expected["variance"] > 0.01
    for name, weight in zip(names, weights, strict=True):
        assert math.isclose(float(terms[name]), weight * expected[name], rel_tol=1e-11)
    total = sum(w * expected[n] for n, w in zip(names, weights, strict=True))
    assert math.isclose(float(loss(FIRST, SECOND)), total, rel_tol=1e-11)


def test_identical_white_views_have_zero_loss() -> None:
    white = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * 2
    assert float(VICRegLoss()(white, white)) == 0


def test_collapsed_views_have_only_the_variance_term() -> None:
    same = torch.ones(4, 3, dtype=torch.float64)
    terms = VICRegLoss().terms(same, same)
    assert math.isclose(float(terms["variance"]), 25 * (1 - math.sqrt(1e-4)), rel_tol=1e-12)
    assert float(terms["invariance"]) == float(terms["covariance"]) == 0


def test_several_views_have_the_mean_of_all_pairs_of_views(ranks: Ranks) -> None:
    views = draw(6, 4, 3)
    pairs = [
        VICRegLoss().terms(views[:, a], views[:, b]) for a, b in itertools.combinations(range(4), 2)
    ]
    for sides in ((views,), (views[:, :3], views[:, 3]), (views[:, 0], views[:, 1:])):
        for name, value in VICRegLoss().terms(*sides).items():
            expected = torch.stack([terms[name] for terms in pairs]).mean()
            torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    assert_same_on_ranks(ranks, VICRegLoss, (views,), splits=[(5, 1), (0, 4, 2)])


def test_a_single_view_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 views together, got 1"):
        VICRegLoss()(FIRST)


def test_groups_have_no_effect() -> None:
    loss = VICRegLoss()
    assert loss(FIRST, SECOND, torch.zeros(6).long()) == loss(FIRST, SECOND)


@pytest.mark.parametrize("name", ["invariance_weight", "variance_weight", "covariance_weight"])
def test_negative_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 0, got -1"):
        VICRegLoss(**{name: -1.0})


def test_an_epsilon_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon must be > 0"):
        VICRegLoss(epsilon=0.0)
