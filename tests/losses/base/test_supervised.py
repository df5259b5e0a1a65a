"""A weighted mean over samples is the same over ranks, and zero if all weights are zero."""

import pytest
import torch
from torch import Tensor

from diptych.losses import BaseSupervisedLoss
from tests.losses.oracles import draw
from tests.losses.ranks import Ranks, assert_same_on_ranks


class Weighted(BaseSupervisedLoss):
    """The weighted mean of values."""

    def total_and_weight(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return (values[:, 0] * weights).sum(), weights.sum()


def test_the_loss_is_the_total_divided_by_the_weight() -> None:
    values, weights = torch.tensor([[1.0], [5.0]]), torch.tensor([1, 3])
    assert Weighted()(values, weights) == 4
    assert Weighted().terms(values, weights) == {"supervised": 4}


def test_weights_of_zero_give_zero_with_a_graph() -> None:
    values = torch.ones(2, 1, requires_grad=True)
    loss = Weighted()(values, torch.zeros(2, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0
    assert values.grad is not None
    assert not values.grad.any()


@pytest.mark.parametrize("weights", [[1, 0, 0, 4, 2, 0], [0, 0, 0, 1, 1, 1], [0] * 6])
def test_ranks_count_by_their_weight(weights: list[int], ranks: Ranks) -> None:
    assert_same_on_ranks(ranks, Weighted, (draw(6, 2), torch.tensor(weights)))
