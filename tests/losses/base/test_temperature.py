"""A temperature: fixed, set, or learned in log space within its bounds."""

import math

import numpy as np
import pytest
import torch

from diptych.losses import Temperature

FLOAT64 = torch.empty(0, dtype=torch.float64)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("value", [0.07, 0.01, 0.5, 1.0, 0.1])
def test_the_scale_is_the_inverse_to_float64_precision(value: float, learn: bool) -> None:
    temperature = Temperature(value, learn=learn, min_scale=1.0, max_scale=100.0)
    scale = temperature.scale(FLOAT64)
    assert scale.dtype == torch.float64
    assert math.isclose(float(scale.detach()), 1 / value, rel_tol=1e-15)


def test_the_scale_has_the_dtype_of_its_features() -> None:
    assert Temperature(0.5).scale(torch.empty(0)).dtype == torch.float32
    assert Temperature(0.5, learn=True).scale(torch.empty(0)).dtype == torch.float32


def test_a_fixed_temperature_has_neither_parameters_nor_state() -> None:
    temperature = Temperature(0.2)
    assert list(temperature.parameters()) == []
    assert temperature.state_dict() == {}


@pytest.mark.parametrize("learn", [False, True])
def test_the_value_can_be_set_for_a_schedule(learn: bool) -> None:
    temperature = Temperature(0.2, learn=learn)
    temperature.value = 0.05
    assert math.isclose(temperature.value, 0.05, rel_tol=1e-6)
    assert math.isclose(float(temperature.scale(FLOAT64).detach()), 20, rel_tol=1e-6)


def test_the_learned_parameter_is_the_log_of_the_scale() -> None:
    temperature = Temperature(0.07, learn=True)
    (name, parameter), *others = temperature.named_parameters()
    assert (name, others) == ("logit_scale", [])
    assert math.isclose(float(parameter.detach()), math.log(1 / 0.07), rel_tol=1e-7)


def test_the_gradient_is_that_of_the_exponential() -> None:
    temperature = Temperature(0.07, learn=True)
    temperature.scale(FLOAT64).backward()
    assert temperature.logit_scale is not None
    assert temperature.logit_scale.grad is not None
    assert math.isclose(float(temperature.logit_scale.grad), 1 / 0.07, rel_tol=1e-6)


@pytest.mark.parametrize(("log_scale", "kept"), [(9.0, 100.0), (-3.0, 1.0), (2.0, math.exp(2))])
def test_constrain_clamps_a_learned_scale_to_both_bounds(log_scale: float, kept: float) -> None:
    temperature = Temperature(0.07, learn=True, min_scale=1.0, max_scale=100.0)
    assert temperature.logit_scale is not None
    parameter = temperature.logit_scale
    parameter.data.fill_(log_scale)
    temperature.constrain()
    assert temperature.logit_scale is parameter
    assert math.isclose(float(temperature.scale(FLOAT64).detach()), kept, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bound", [20.0, 30.0, 50.0, 100.0])
def test_a_scale_in_half_precision_stays_within_its_bounds(
    bound: float, dtype: torch.dtype
) -> None:
    for temperature, reach in (
        (Temperature(0.2, learn=True, max_scale=bound), 9.0),
        (Temperature(0.001, learn=True, min_scale=bound), -9.0),
    ):
        temperature.to(dtype)
        assert temperature.logit_scale is not None
        temperature.logit_scale.data.fill_(reach)
        temperature.constrain()
        scale = math.exp(float(temperature.logit_scale.detach()))
        assert scale <= bound if reach > 0 else scale >= bound
        assert math.isclose(scale, bound, rel_tol=4 * torch.finfo(dtype).eps)


def test_constrain_does_not_change_an_unbounded_or_fixed_temperature() -> None:
    temperature = Temperature(0.07, learn=True)
    temperature.value = 1e-4
    temperature.constrain()
    assert math.isclose(temperature.value, 1e-4, rel_tol=1e-5)
    fixed = Temperature(5.0, min_scale=1.0, max_scale=100.0)
    fixed.constrain()
    assert fixed.value == 5.0


def test_a_trained_temperature_survives_its_state_dict() -> None:
    temperature, other = (Temperature(0.07, learn=True) for _ in range(2))
    temperature.value = 0.031
    other.load_state_dict(temperature.state_dict())
    assert other.scale(FLOAT64) == temperature.scale(FLOAT64)


def test_scalars_are_detached_and_consistent() -> None:
    scalars = Temperature(0.25, learn=True).scalars()
    assert not any(value.requires_grad for value in scalars.values())
    torch.testing.assert_close(scalars["temperature"], torch.tensor(0.25))
    torch.testing.assert_close(scalars["logit_scale"], torch.tensor(math.log(4)))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_value_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be > 0, got {value}"):
        Temperature(value)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        Temperature(1.0).value = value


def test_a_learned_value_outside_its_bounds_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"\[0.01, 1\], got 2.0. .* Widen the bounds"):
        Temperature(2.0, learn=True, min_scale=1.0, max_scale=100.0)
    with pytest.raises(ValueError, match="0 < min < max"):
        Temperature(0.5, learn=True, min_scale=3.0, max_scale=2.0)


def test_a_number_of_numpy_is_a_temperature():
    assert Temperature(np.float32(0.5)).value == pytest.approx(0.5)
