"""Every loss that takes `tile` is the same in tiles, alone and on several ranks."""

import inspect
from functools import partial

import pytest
import torch

from diptych.losses import available_losses, get_loss_class
from diptych.losses.contract import Case, check_loss, gradients
from tests.losses.ranks import Ranks, assert_same_on_ranks

TILED = [
    name
    for name in available_losses()
    if "tile" in inspect.signature(get_loss_class(name)).parameters
]
GROUPS = torch.tensor([4, 1, 4, 2, 1, 4])


def inputs(name: str, *, grouped: bool) -> tuple[torch.Tensor, ...]:
    drawn = Case(get_loss_class(name)).inputs()
    takes = Case(get_loss_class(name)).names()[len(drawn) :][:1] == ["groups"]
    return (*drawn, GROUPS) if grouped and takes else drawn


def test_the_losses_of_similarity_matrices_take_a_tile() -> None:
    assert {"clip", "siglip", "simclr", "decoupled"} <= set(TILED)


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("tile", [1, 4, 100])
@pytest.mark.parametrize("grouped", [False, True])
def test_value_and_gradients_in_tiles_are_those_of_the_whole_matrix(
    name: str, tile: int, grouped: bool
) -> None:
    build = get_loss_class(name)
    given = inputs(name, grouped=grouped)
    whole, tiles = (gradients(Case(partial(build, tile=t)), given) for t in (None, tile))
    torch.testing.assert_close(tiles, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", TILED)
def test_a_loss_in_tiles_keeps_the_contract(name: str) -> None:
    check_loss(partial(get_loss_class(name), tile=2))


@pytest.mark.parametrize("name", TILED)
def test_a_loss_in_tiles_is_the_same_on_ranks(name: str, ranks: Ranks) -> None:
    build = partial(get_loss_class(name), tile=2)
    assert_same_on_ranks(ranks, build, inputs(name, grouped=True), splits=[(2, 4), (1, 3, 2)])
