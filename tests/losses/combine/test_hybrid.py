"""HybridLoss between alpha = 0 and alpha = 1."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from diptych.losses import BarlowTwinsLoss, CLIPLoss, HybridLoss, SigLIPLoss, VICRegLoss
from tests.losses.oracles import draw
from tests.losses.ranks import Ranks, assert_same_on_ranks

SIDES = draw(6, 8), draw(6, 8, seed=1)
GROUPS = torch.tensor([4, 1, 4, 2, 1, 4])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_value_is_the_mixture_of_clip_and_vicreg(alpha: float) -> None:
    value = HybridLoss(alpha=alpha)(*SIDES, GROUPS)

    expected = (1 - alpha) * CLIPLoss()(*SIDES, GROUPS) + alpha * VICRegLoss()(*SIDES)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)


def test_alpha_can_be_set_is_published_and_is_not_in_the_state_dict() -> None:
    loss = HybridLoss()
    before = loss.state_dict().keys()

    for alpha in (0.0, 0.5, 1.0):
        loss.alpha = alpha
        assert float(loss.scalars()["alpha"]) == alpha
        terms = loss.terms(*SIDES)
        torch.testing.assert_close(terms["contrastive"], (1 - alpha) * CLIPLoss()(*SIDES))

    assert loss.state_dict().keys() == before == {"losses.contrastive.temperature.logit_scale"}
    assert "contrastive/temperature" in loss.scalars()


def test_terms_keep_their_names_at_both_ends() -> None:
    names = ["contrastive", "vicreg/invariance", "vicreg/variance", "vicreg/covariance"]

    assert all(list(HybridLoss(alpha=a).terms(*SIDES)) == names for a in (0.0, 1.0))


def test_the_parts_can_be_replaced() -> None:
    loss = HybridLoss(alpha=0.5, contrastive=SigLIPLoss(), vicreg=BarlowTwinsLoss())

    torch.testing.assert_close(loss(*SIDES), (SigLIPLoss()(*SIDES) + BarlowTwinsLoss()(*SIDES)) / 2)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_both_ends_are_the_same_on_ranks(alpha: float, ranks: Ranks) -> None:
    assert_same_on_ranks(ranks, partial(HybridLoss, alpha=alpha), (*SIDES, GROUPS))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got "):
        HybridLoss(alpha=alpha)
    loss = HybridLoss(alpha=0.5)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got "):
        loss.alpha = alpha
    assert loss.alpha == 0.5
