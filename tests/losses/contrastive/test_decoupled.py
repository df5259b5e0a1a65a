"""DCL and DCLW against a plain loop."""

import math
from functools import partial

import pytest
import torch

from diptych.losses import DecoupledContrastiveLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import cosine, draw, logits, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

FIRST, SECOND = draw(6, 4), draw(6, 4, seed=1)
GROUPS = [0, 1, 0, 2, 1, 3]


def expected_value(sigma: float | None, ids: list[int]) -> float:
    views = torch.cat((FIRST, SECOND))
    rows = logits(views, views, 0.1)
    weights = [1.0] * 6
    if sigma is not None:
        agreement = [
            cosine(a, b) / sigma for a, b in zip(FIRST.tolist(), SECOND.tolist(), strict=True)
        ]
        weights = [2 - 6 * math.exp(value - lse(agreement)) for value in agreement]
    return mean(
        lse(row[k] for k in range(12) if ids[k % 6] != ids[i % 6])
        - weights[i % 6] * row[(i + 6) % 12]
        for i, row in enumerate(rows)
    )


@pytest.mark.parametrize("sigma", [None, 0.5, 0.1])
@pytest.mark.parametrize("grouped", [False, True])
def test_value_is_that_of_the_loop(sigma: float | None, grouped: bool) -> None:
    ids = GROUPS if grouped else list(range(6))
    found = DecoupledContrastiveLoss(sigma=sigma)(
        FIRST, SECOND, torch.tensor(GROUPS) if grouped else None
    )
    assert math.isclose(float(found), expected_value(sigma, ids), rel_tol=1e-12)


def test_the_weights_are_constants_for_the_gradient() -> None:
    leaves = [x.clone().requires_grad_() for x in (FIRST, SECOND)]
    (plain, weighted) = (
        torch.autograd.grad(DecoupledContrastiveLoss(sigma=sigma)(*leaves), leaves)[0]
        for sigma in (None, 0.5)
    )
    unit = [torch.nn.functional.normalize(x) for x in leaves]
    agreement = (unit[0] * unit[1]).sum(1)
    weights = 2 - 6 * (agreement / 0.5).softmax(0).detach()
    (extra,) = torch.autograd.grad(((1 - weights) * agreement / 0.1).mean(), leaves[:1])
    torch.testing.assert_close(weighted, plain + extra, rtol=1e-10, atol=1e-13)


def test_it_can_be_negative() -> None:
    basis = torch.eye(2)
    assert float(DecoupledContrastiveLoss()(basis, basis)) < 0


def test_a_single_sample_is_an_error_not_minus_infinity() -> None:
    with pytest.raises(ValueError, match="needs a global batch of at least 2, got 1"):
        DecoupledContrastiveLoss()(FIRST[:1], SECOND[:1])


def test_anchors_without_negatives_are_left_out_of_the_mean() -> None:
    groups = torch.zeros(6, dtype=torch.int64)
    assert float(DecoupledContrastiveLoss(sigma=0.5)(FIRST, SECOND, groups)) == 0


def test_the_weighted_form_is_the_same_on_ranks(ranks: Ranks) -> None:
    build = partial(DecoupledContrastiveLoss, sigma=0.5)
    for inputs in ((FIRST, SECOND), (FIRST, SECOND, torch.tensor(GROUPS))):
        assert_same_on_ranks(ranks, build, inputs, splits=[(2, 4), (1, 3, 2)])


def test_the_weighted_form_keeps_the_contract_but_for_finite_differences() -> None:
    class Weighted(DecoupledContrastiveLoss):
        """DCLW, whose detached weights finite differences would see move."""

        exempt = {"gradients": "the weights are constants for the gradient"}  # noqa: RUF012

    check_loss(lambda: Weighted(sigma=0.5))


@pytest.mark.parametrize("sigma", [0.0, -1.0])
def test_a_width_that_is_not_positive_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be > 0"):
        DecoupledContrastiveLoss(sigma=sigma)
