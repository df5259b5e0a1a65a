"""Hard negatives against plain loops and the identities that the papers state."""

import math
from functools import partial

import pytest
import torch

from diptych.losses import CLIPLoss, DecoupledContrastiveLoss, HardNegativeLoss, NTXentLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import draw, logits, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

FIRST, SECOND = draw(6, 4), draw(6, 4, seed=1)
GROUPS = [0, 1, 0, 2, 1, 3]
# Views that agree: the estimate falls below its floor for some anchors.
NEAR = FIRST + 0.05 * SECOND


def debiased(second: torch.Tensor, beta: float, prior: float, ids: list[int]) -> float:
    views, temperature = torch.cat((FIRST, second)), 0.5
    losses = []
    for i, row in enumerate(logits(views, views, temperature)):
        positive = math.exp(row[(i + 6) % 12])
        negatives = [math.exp(row[k]) for k in range(12) if ids[k % 6] != ids[i % 6]]
        weights = [value**beta for value in negatives]
        hard = sum(w * n for w, n in zip(weights, negatives, strict=True)) / mean(weights)
        count = len(negatives)
        estimate = (hard - prior * count * positive) / (1 - prior)
        estimate = max(estimate, count * math.exp(-1 / temperature))
        losses.append(-math.log(positive / (positive + estimate)))
    return mean(losses)


@pytest.mark.parametrize("prior", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("second", [SECOND, NEAR])
def test_debiased_value_is_that_of_the_loop(
    second: torch.Tensor, beta: float, prior: float
) -> None:
    loss = HardNegativeLoss(kind="debiased", beta=beta, prior=prior)
    for ids in (list(range(6)), GROUPS):
        found = float(loss(FIRST, second, torch.tensor(ids)))
        assert math.isclose(found, debiased(second, beta, prior, ids), rel_tol=1e-12)
    assert math.isclose(
        float(loss(FIRST, second)), debiased(second, beta, prior, list(range(6))), rel_tol=1e-12
    )


def test_debiased_without_prior_or_weights_is_simclr() -> None:
    loss = HardNegativeLoss(kind="debiased", beta=0.0, prior=0.0, temperature=0.3)
    expected = NTXentLoss(temperature=0.3)(FIRST, SECOND)
    torch.testing.assert_close(loss(FIRST, SECOND), expected, rtol=1e-12, atol=0)


def hn_nce(beta: float, alpha: float, ids: list[int]) -> float:
    rows = logits(FIRST, SECOND, 0.5)
    columns = [list(column) for column in zip(*rows, strict=True)]
    losses = []
    for side in (rows, columns):
        for i, row in enumerate(side):
            others = [value for j, value in enumerate(row) if ids[j] != ids[i]]
            share = math.fsum(math.exp(beta * value) for value in others)
            hard = math.fsum(
                len(others) * math.exp(beta * value) / share * math.exp(value) for value in others
            )
            losses.append(math.log(alpha * math.exp(row[i]) + hard) - row[i])
    return mean(losses)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_hn_nce_value_is_that_of_the_loop(beta: float, alpha: float) -> None:
    loss = HardNegativeLoss(kind="hn_nce", beta=beta, alpha=alpha)
    for ids in (list(range(6)), GROUPS):
        found = float(loss(FIRST, SECOND, torch.tensor(ids)))
        assert math.isclose(found, hn_nce(beta, alpha, ids), rel_tol=1e-12)


def test_hn_nce_without_weights_is_clip_exactly() -> None:
    leaves = [x.clone().requires_grad_() for x in (FIRST, SECOND)]
    losses = (
        HardNegativeLoss(kind="hn_nce", beta=0.0, alpha=1.0, temperature=0.07)(*leaves),
        CLIPLoss(temperature=0.07, learn_temperature=False)(*leaves),
    )
    gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-15)


def test_defaults_of_the_exponent_follow_the_papers() -> None:
    assert HardNegativeLoss().negatives.beta == 1.0
    assert HardNegativeLoss(kind="hn_nce").negatives.beta == 0.25


def test_detached_weights_change_the_gradient_and_not_the_value() -> None:
    for kind in ("debiased", "hn_nce"):
        values, gradients = [], []
        for detach in (False, True):
            first = FIRST.clone().requires_grad_()
            value = HardNegativeLoss(kind=kind, detach_weights=detach)(first, SECOND)
            values.append(float(value.detach()))
            gradients.append(torch.autograd.grad(value, first)[0])
        assert values[0] == values[1]
        assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)


@pytest.mark.parametrize("kind", ["debiased", "hn_nce"])
def test_gradients_on_the_floor_are_finite_at_the_lowest_temperature(kind: str) -> None:
    first = FIRST.float().requires_grad_()
    loss = HardNegativeLoss(kind=kind, temperature=0.01, prior=0.5)
    loss(first, FIRST.float() + 1e-4).backward()
    assert first.grad is not None
    assert bool(first.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["debiased", "hn_nce"])
def test_it_keeps_the_contract_on_ranks_too(kind: str, ranks: Ranks) -> None:
    build = partial(HardNegativeLoss, kind=kind, alpha=0.5, learn_temperature=True)
    check_loss(build)
    inputs = (FIRST, SECOND, torch.tensor(GROUPS))
    assert_same_on_ranks(ranks, build, inputs, splits=[(2, 4), (1, 3, 2)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "hard"}, "kind must be one of 'debiased', 'hn_nce'"),
        ({"prior": 1.0}, r"prior must lie in \[0, 1\), got 1.0"),
        ({"alpha": 0.0}, "alpha must be > 0"),
        ({"beta": -1.0}, "beta must be >= 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardNegativeLoss(**arguments)  # type: ignore[arg-type]


def test_one_sample_is_an_error_as_for_every_loss_of_negatives_alone() -> None:
    for loss in (HardNegativeLoss(), DecoupledContrastiveLoss()):
        with pytest.raises(ValueError, match="at least 2"):
            loss(FIRST[:1], SECOND[:1])
