"""The triplet loss against a plain loop over triplets."""

import math
from functools import partial

import pytest
import torch

from diptych.losses import TripletLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import draw, logits
from tests.losses.ranks import Ranks, assert_same_on_ranks

FIRST = draw(6, 4)
SECOND = FIRST + draw(6, 4, seed=1)
GROUPS = [0, 1, 0, 2, 1, 3]


def expected_value(negatives: str, margin: float, ids: list[int]) -> float:
    rows = logits(FIRST, SECOND, 1.0)
    columns = [list(column) for column in zip(*rows, strict=True)]
    total = 0.0
    for side in (rows, columns):
        for i, row in enumerate(side):
            others = [value for j, value in enumerate(row) if ids[j] != ids[i]]
            if negatives == "hardest":
                others = [max(others)]
            if negatives == "semi_hard":
                others = [value for value in others if row[i] - margin < value < row[i]]
            total += math.fsum(max(0.0, margin + value - row[i]) for value in others)
    return total


@pytest.mark.parametrize("margin", [0.2, 0.7])
@pytest.mark.parametrize("negatives", ["sum", "hardest", "semi_hard"])
@pytest.mark.parametrize("grouped", [False, True])
def test_value_is_that_of_the_loop(negatives: str, margin: float, grouped: bool) -> None:
    ids = GROUPS if grouped else list(range(6))
    groups = torch.tensor(GROUPS) if grouped else None
    expected = expected_value(negatives, margin, ids)
    found = TripletLoss(margin=margin, negatives=negatives)(FIRST, SECOND, groups)
    averaged = TripletLoss(margin=margin, negatives=negatives, reduction="mean")
    assert expected > 0
    assert math.isclose(float(found), expected, rel_tol=1e-12)
    assert math.isclose(float(averaged(FIRST, SECOND, groups)), expected / 6, rel_tol=1e-12)


def test_negatives_can_change_during_training() -> None:
    loss = TripletLoss()
    loss.negatives = "hardest"
    assert math.isclose(
        float(loss(FIRST, SECOND)), expected_value("hardest", 0.2, list(range(6))), rel_tol=1e-12
    )
    with pytest.raises(ValueError, match="negatives must be one of 'sum', 'hardest', 'semi_hard'"):
        loss.negatives = "max"


@pytest.mark.parametrize("negatives", ["hardest", "semi_hard"])
def test_every_choice_keeps_the_contract_on_ranks_too(negatives: str, ranks: Ranks) -> None:
    build = partial(TripletLoss, negatives=negatives, margin=0.7)
    check_loss(build)
    inputs = (FIRST, SECOND, torch.tensor(GROUPS))
    assert_same_on_ranks(ranks, build, inputs, splits=[(2, 4), (1, 3, 2)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"margin": -0.1}, "margin must be >= 0"),
        ({"negatives": "max"}, "negatives must be one of"),
        ({"reduction": "none"}, "reduction must be one of"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TripletLoss(**arguments)  # type: ignore[arg-type]
