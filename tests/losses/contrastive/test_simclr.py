"""NT-Xent against a plain loop and a cross entropy."""

import math

import pytest
import torch
import torch.nn.functional as F

from diptych.losses import NTXentLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import draw, logits, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

FIRST, SECOND = draw(5, 4), draw(5, 4, seed=1)


@pytest.mark.parametrize("groups", [None, [0, 1, 0, 2, 1]])
@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_value_is_that_of_the_loop(temperature: float, groups: list[int] | None) -> None:
    views = torch.cat((FIRST, SECOND))
    rows = logits(views, views, temperature)
    ids = (groups or list(range(5))) * 2
    expected = mean(
        lse(row[k] for k in range(10) if k != i)
        - mean(row[k] for k in range(10) if k != i and ids[k] == ids[i])
        for i, row in enumerate(rows)
    )
    loss = NTXentLoss(temperature=temperature)
    found = loss(FIRST, SECOND, groups and torch.tensor(groups))
    assert math.isclose(float(found), expected, rel_tol=1e-12)


def test_gradients_are_those_of_the_papers_cross_entropy() -> None:
    leaves = [x.clone().requires_grad_() for x in (FIRST, SECOND)]
    views = F.normalize(torch.cat(leaves))
    matrix = (views @ views.T / 0.5).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(matrix, (torch.arange(10) + 5) % 10)
    found = NTXentLoss()(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves),
        torch.autograd.grad(expected, leaves),
        rtol=1e-10,
        atol=1e-14,
    )


def test_a_single_sample_gives_zero_and_chance_gives_the_log_of_the_candidates() -> None:
    assert float(NTXentLoss()(FIRST[:1], SECOND[:1])) == 0
    same = torch.ones(4, 3)
    assert math.isclose(float(NTXentLoss()(same, same)), math.log(7), rel_tol=1e-6)


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("groups", [None, [0, 1, 0, 2, -100]])
def test_all_other_views_of_a_sample_are_positives(
    groups: list[int] | None, tile: int | None
) -> None:
    first, second = draw(5, 2, 4), draw(5, 4, seed=1)
    views = torch.cat([first[:, 0], first[:, 1], second])
    rows = logits(views, views, 0.5)
    ids = ([0, 1, 0, 2, 3] if groups else list(range(5))) * 3
    expected = mean(
        lse(row[k] for k in range(15) if k != i)
        - mean(row[k] for k in range(15) if k != i and ids[k] == ids[i])
        for i, row in enumerate(rows)
    )
    given = None if groups is None else torch.tensor(groups)
    loss = NTXentLoss(tile=tile)
    assert math.isclose(float(loss(first, second, given)), expected, rel_tol=1e-12)
    together = torch.cat([first, second[:, None]], dim=1)
    assert math.isclose(float(loss(together, None, given)), expected, rel_tol=1e-12)


def test_two_views_in_one_argument_are_two_arguments() -> None:
    assert NTXentLoss()(torch.stack([FIRST, SECOND], dim=1)) == NTXentLoss()(FIRST, SECOND)
    with pytest.raises(ValueError, match="first must have two views at least, got one"):
        NTXentLoss()(FIRST)


def test_more_views_are_the_same_on_ranks(ranks: Ranks) -> None:
    assert_same_on_ranks(ranks, NTXentLoss, (draw(6, 3, 4),), splits=[(2, 4), (3, 0, 3)])


def test_a_learned_temperature_keeps_the_contract() -> None:
    check_loss(lambda: NTXentLoss(learn_temperature=True))
