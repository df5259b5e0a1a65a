"""SigLIP against a plain loop."""

import math

import pytest
import torch

from diptych.losses import SigLIPLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import draw, logits

FIRST, SECOND = draw(5, 4), draw(5, 4, seed=1)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(("temperature", "bias"), [(0.1, -10.0), (0.03, -2.3), (2.0, 0.7)])
@pytest.mark.parametrize("groups", [None, [0, 1, 0, 2, 1]])
def test_value_is_that_of_the_loop(
    groups: list[int] | None, temperature: float, bias: float, learn: bool
) -> None:
    ids = groups or list(range(5))
    rows = logits(FIRST, SECOND, temperature)
    expected = 0.0
    for i in range(5):
        for j in range(5):
            sign = 1 if ids[i] == ids[j] else -1
            expected += math.log1p(math.exp(-sign * (rows[i][j] + bias))) / 5
    loss = SigLIPLoss(temperature=temperature, bias=bias, learn_temperature=learn)
    found = loss(FIRST, SECOND, groups and torch.tensor(groups)).detach()
    assert math.isclose(float(found), expected, rel_tol=1e-12)


def test_temperature_and_bias_are_learned_together_or_not_at_all() -> None:
    names = {name for name, _ in SigLIPLoss().named_parameters()}
    assert names == {"temperature.logit_scale", "bias"}
    assert set(SigLIPLoss().scalars()) == {"temperature", "logit_scale", "bias"}
    fixed = SigLIPLoss(learn_temperature=False)
    assert list(fixed.parameters()) == []
    assert fixed.scalars() == {}


def test_the_scale_is_unbounded_unless_asked() -> None:
    loss, bounded = SigLIPLoss(), SigLIPLoss(max_logit_scale=100.0)
    for each in (loss, bounded):
        each.temperature.value = 1e-3
        each.temperature.constrain()
    assert math.isclose(loss.temperature.value, 1e-3, rel_tol=1e-5)
    assert math.isclose(bounded.temperature.value, 1e-2, rel_tol=1e-5)


def test_the_fixed_form_keeps_the_contract() -> None:
    check_loss(lambda: SigLIPLoss(learn_temperature=False, bias=-1.0))


@pytest.mark.parametrize("bias", [math.nan, math.inf])
def test_a_bias_that_is_not_finite_is_refused(bias: float) -> None:
    with pytest.raises(ValueError, match="bias must be finite"):
        SigLIPLoss(bias=bias)
