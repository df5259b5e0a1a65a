"""Negative cosine: SimSiam's and BYOL's form."""

import math

import pytest
import torch
import torch.nn.functional as F

from diptych.losses import NegativeCosineLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import cosine, draw, mean

FIRST, SECOND = draw(5, 4), draw(5, 4, seed=1)


def test_value_is_that_of_the_loop() -> None:
    agreement = mean(cosine(a, b) for a, b in zip(FIRST.tolist(), SECOND.tolist(), strict=True))
    simsiam = NegativeCosineLoss()(FIRST, SECOND)
    byol = NegativeCosineLoss(kind="byol")(FIRST, SECOND)
    assert math.isclose(float(simsiam), -agreement, rel_tol=1e-12)
    assert math.isclose(float(byol), 2 - 2 * agreement, rel_tol=1e-12)


def test_byol_is_the_squared_distance_of_unit_vectors() -> None:
    expected = (F.normalize(FIRST) - F.normalize(SECOND)).square().sum(1).mean()
    torch.testing.assert_close(NegativeCosineLoss(kind="byol")(FIRST, SECOND), expected)


def test_targets_get_no_gradient() -> None:
    predictions, targets = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    NegativeCosineLoss()(predictions, targets).backward()
    assert targets.grad is None
    assert predictions.grad is not None


def test_concatenated_directions_are_the_symmetrised_loss() -> None:
    p1, p2, z1, z2 = (draw(3, 4, seed=seed) for seed in range(4))
    loss = NegativeCosineLoss()
    expected = (loss(p1, z2) + loss(p2, z1)) / 2
    torch.testing.assert_close(loss(torch.cat((p1, p2)), torch.cat((z2, z1))), expected)


def test_the_other_form_keeps_the_contract() -> None:
    check_loss(lambda: NegativeCosineLoss(kind="byol"))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of 'simsiam', 'byol'"):
        NegativeCosineLoss(kind="moco")
