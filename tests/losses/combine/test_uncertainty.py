"""UncertaintyWeighted: its formula, its fixed point, and the losses that it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from diptych.losses import (
    BaseContrastiveLoss,
    CLIPLoss,
    DecoupledContrastiveLoss,
    HardNegativeLoss,
    MatryoshkaLoss,
    NegativeCosineLoss,
    SigLIPLoss,
    UncertaintyWeighted,
    VICRegLoss,
    WeightedSum,
)
from tests.losses.oracles import draw
from tests.losses.ranks import Ranks, assert_same_on_ranks

SIDES = draw(6, 8), draw(6, 8, seed=1)


def weighted(values: tuple[float, float]) -> UncertaintyWeighted:
    """Return a loss with given s for CLIP and VICReg."""
    loss = UncertaintyWeighted(losses={"clip": CLIPLoss(), "vicreg": VICRegLoss()}).double()
    with torch.no_grad():
        loss.log_variances.copy_(torch.tensor(values))
    return loss


@pytest.mark.parametrize("s", [(0.0, 0.0), (0.7, -1.3)])
def test_value_and_gradient_of_s_are_the_papers(s: tuple[float, float]) -> None:
    loss = weighted(s)
    parts = [float(part(*SIDES).detach()) for part in (CLIPLoss().double(), VICRegLoss())]
    s = tuple(loss.log_variances.tolist())  # as float32 held them

    value = loss(*SIDES)
    value.backward()

    expected = math.fsum(math.exp(-x) * part + x / 2 for x, part in zip(s, parts, strict=True))
    slopes = [-math.exp(-x) * part + 0.5 for x, part in zip(s, parts, strict=True)]
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)
    assert loss.log_variances.grad.tolist() == pytest.approx(slopes, rel=1e-10)


def test_it_converges_to_equal_shares_of_all_losses() -> None:
    loss = weighted((0.0, 0.0))
    optimizer = torch.optim.LBFGS([loss.log_variances], max_iter=100, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(*SIDES)
        value.backward()
        return value

    optimizer.step(closure)

    terms = loss.terms(*SIDES)
    assert float(terms["clip"].detach()) == pytest.approx(0.5, rel=1e-4)
    vicreg = sum(float(t.detach()) for name, t in terms.items() if name.startswith("vicreg/"))
    assert vicreg == pytest.approx(0.5, rel=1e-4)


def test_terms_and_scalars_include_each_parts_weight() -> None:
    loss = weighted((math.log(2), 0.0))

    terms, scalars = loss.terms(*SIDES), loss.scalars()

    torch.testing.assert_close(terms["clip"], CLIPLoss().double()(*SIDES) / 2)
    assert list(terms)[-1] == "log_variance"
    assert float(scalars["clip/weight"]) == pytest.approx(0.5)
    assert float(scalars["vicreg/weight"]) == 1
    assert not any(value.requires_grad for value in scalars.values())


def test_groups_are_the_same_on_ranks(ranks: Ranks) -> None:
    groups = torch.tensor([4, 1, 4, 2, 1, 4])

    assert_same_on_ranks(ranks, UncertaintyWeighted.example, (*SIDES, groups))


class SignedLoss(BaseContrastiveLoss):
    """A user's loss that declares that it can be negative."""

    can_be_negative = True


@pytest.mark.parametrize(
    "part",
    [
        DecoupledContrastiveLoss(),
        NegativeCosineLoss(),
        HardNegativeLoss(kind="hn_nce", alpha=0.5),
        SignedLoss(),
        WeightedSum(losses=[CLIPLoss(), DecoupledContrastiveLoss()]),
        MatryoshkaLoss(loss=NegativeCosineLoss(), dims=(4,)),
        UncertaintyWeighted(losses=[CLIPLoss(), SigLIPLoss()]),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_a_loss_that_can_be_negative_is_refused(part: nn.Module) -> None:
    with pytest.raises(ValueError, match="losses must not be negative, got 'part' with "):
        UncertaintyWeighted(losses={"clip": CLIPLoss(), "part": part})


@pytest.mark.parametrize(
    "part",
    [NegativeCosineLoss(kind="byol"), HardNegativeLoss(kind="hn_nce"), nn.MSELoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_forms_that_cannot_be_negative_are_accepted(part: nn.Module) -> None:
    loss = UncertaintyWeighted(losses={"clip": CLIPLoss(), "part": part})

    assert bool(loss(*SIDES).isfinite())
    assert loss.couples_samples
