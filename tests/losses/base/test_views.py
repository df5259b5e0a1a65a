"""Moments over ranks equal those of the whole batch."""

import torch

from diptych.losses.base.gather import global_batch
from diptych.losses.base.views import centered, second_moment, variance
from tests.losses.oracles import covariance, draw
from tests.losses.ranks import Ranks


def moments_on_rank(features: torch.Tensor) -> list[torch.Tensor]:
    batch = global_batch(len(features))
    side = centered(features, batch)
    return [second_moment(side, side, batch, ddof=1), variance(side, batch)[0]]


def test_moments_are_those_of_a_loop_on_any_number_of_ranks(ranks: Ranks) -> None:
    features = draw(7, 3) + 1e3
    expected = torch.tensor(covariance(features.tolist(), 1), dtype=torch.float64)
    biased = expected.diagonal() * 6 / 7
    answers = [moments_on_rank(features)]
    for pieces in (features.split([3, 4]), features.split([1, 4, 2])):
        answers += ranks.run(moments_on_rank, [(piece,) for piece in pieces])
    assert len(answers) == 6
    for found in answers:
        torch.testing.assert_close(found, [expected, biased], rtol=1e-9, atol=1e-12)
