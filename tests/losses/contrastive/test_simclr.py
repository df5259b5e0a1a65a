"""NT-Xent against a plain loop and a cross entropy."""

import math

import pytest
import torch
import torch.nn.functional as F

from diptych.losses import NTXentLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import draw, logits, lse, mean

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


def test_a_learned_temperature_keeps_the_contract() -> None:
    check_loss(lambda: NTXentLoss(learn_temperature=True))
