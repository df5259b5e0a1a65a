"""Barlow Twins against a plain loop and batch normalisation."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from diptych.losses import BarlowTwinsLoss
from tests.losses.oracles import draw, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

FIRST, SECOND = draw(6, 4), draw(6, 4, seed=1) + 2


def standardised(side: torch.Tensor) -> list[list[float]]:
    columns = []
    for column in side.T.tolist():
        centre = mean(column)
        variance = mean((value - centre) ** 2 for value in column)
        columns.append([(value - centre) / math.sqrt(variance + 1e-5) for value in column])
    return columns


@pytest.mark.parametrize("redundancy_weight", [0.005, 0.3])
def test_terms_are_those_of_the_loop(redundancy_weight: float) -> None:
    first, second = standardised(FIRST), standardised(SECOND)
    invariance = redundancy = 0.0
    for i in range(4):
        for j in range(4):
            value = mean(a * b for a, b in zip(first[i], second[j], strict=True))
            if i == j:
                invariance += (value - 1) ** 2
            else:
                redundancy += redundancy_weight * value**2
    terms = BarlowTwinsLoss(redundancy_weight=redundancy_weight).terms(FIRST, SECOND)
    assert math.isclose(float(terms["invariance"]), invariance, rel_tol=1e-11)
    assert math.isclose(float(terms["redundancy"]), redundancy, rel_tol=1e-11)


def test_value_and_gradient_are_those_with_batch_normalisation() -> None:
    leaves = [x.clone().requires_grad_() for x in (FIRST, SECOND)]
    normed = [F.batch_norm(x, None, None, training=True, eps=1e-5) for x in leaves]
    matrix = normed[0].T @ normed[1] / 6
    off = matrix - torch.diag(matrix.diagonal())
    expected = (matrix.diagonal() - 1).square().sum() + 0.005 * off.square().sum()
    found = BarlowTwinsLoss()(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves),
        torch.autograd.grad(expected, leaves),
        rtol=1e-8,
        atol=1e-12,
    )


def test_several_views_have_the_mean_of_all_pairs_of_views(ranks: Ranks) -> None:
    views = draw(6, 4, 3)
    pairs = itertools.combinations(range(4), 2)
    values = [BarlowTwinsLoss()(views[:, a], views[:, b]) for a, b in pairs]
    torch.testing.assert_close(
        BarlowTwinsLoss()(views), torch.stack(values).mean(), rtol=1e-11, atol=0
    )
    assert_same_on_ranks(ranks, BarlowTwinsLoss, (views,), splits=[(5, 1), (0, 4, 2)])


def test_identical_white_views_have_almost_zero_loss() -> None:
    white = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(BarlowTwinsLoss()(white, 5 * white)) < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"redundancy_weight": -1.0}, "redundancy_weight must be >= 0"),
        ({"epsilon": 0.0}, "epsilon must be > 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BarlowTwinsLoss(**arguments)
