"""A rank without samples takes part in the collective calls and does not change the result."""

import pytest

from diptych.losses import available_losses, get_loss_class
from diptych.losses.contract import Case
from tests.losses.ranks import Ranks, assert_same_on_ranks


@pytest.mark.parametrize("name", list(available_losses()))
def test_every_loss_is_the_same_when_a_rank_has_no_sample(name: str, ranks: Ranks) -> None:
    build = get_loss_class(name).example

    assert_same_on_ranks(ranks, build, Case(build).inputs(), splits=((6, 0), (0, 4, 2)))
