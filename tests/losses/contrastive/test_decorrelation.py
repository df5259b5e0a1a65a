"""Decorrelation against a plain loop over dimensions."""

import math
from functools import partial

import pytest
import torch

from diptych.losses import DecorrelationLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import covariance, draw
from tests.losses.ranks import Ranks, assert_same_on_ranks

FIRST, SECOND = draw(6, 4), 3 * draw(6, 4, seed=1) + 2


def expected_value(side: torch.Tensor, kind: str) -> float:
    matrix = covariance(side.tolist(), ddof=1)
    total = 0.0
    for i in range(4):
        for j in range(4):
            value = matrix[i][j]
            if kind == "correlation":
                value /= math.sqrt((matrix[i][i] + 1e-5) * (matrix[j][j] + 1e-5))
            total += (i != j) * value**2 / 4
    return total


@pytest.mark.parametrize("kind", ["covariance", "correlation"])
def test_value_is_that_of_the_loop_for_one_side_and_for_two(kind: str) -> None:
    loss = DecorrelationLoss(kind=kind)
    one, two = (expected_value(side, kind) for side in (FIRST, SECOND))
    assert math.isclose(float(loss(FIRST)), one, rel_tol=1e-11)
    assert math.isclose(float(loss(FIRST, SECOND)), one + two, rel_tol=1e-11)
    assert float(loss.terms(FIRST, SECOND)["decorrelation"]) == float(loss(FIRST, SECOND))


def test_a_repeated_dimension_is_penalised() -> None:
    column = draw(50, 1)
    repeated = torch.cat((column, column), dim=1)
    assert math.isclose(float(DecorrelationLoss(kind="correlation")(repeated)), 1, rel_tol=1e-4)
    white = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(DecorrelationLoss()(white)) == 0


def test_both_ways_of_calling_keep_the_contract_on_ranks(ranks: Ranks) -> None:
    build = partial(DecorrelationLoss, kind="correlation")
    check_loss(build)
    for inputs in ((FIRST,), (FIRST, SECOND)):
        assert_same_on_ranks(ranks, build, inputs, splits=[(2, 4), (1, 3, 2)])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of 'covariance', 'correlation'"):
        DecorrelationLoss(kind="cosine")
    with pytest.raises(ValueError, match="at least 2, got 1"):
        DecorrelationLoss()(FIRST[:1])
