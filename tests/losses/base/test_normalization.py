"""L2 normalisation: torch's values, and no gradient without a direction."""

import pytest
import torch
import torch.nn.functional as F

from diptych.losses.base.normalization import normalize
from tests.losses.oracles import draw


def test_normalised_vectors_have_unit_length_and_the_usual_gradient() -> None:
    features, weights = draw(5, 7), draw(5, 7, seed=1)
    results = []
    for function in (normalize, F.normalize):
        leaf = features.clone().requires_grad_()
        value = function(leaf)
        (value * weights).sum().backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=1e-15)


def test_normalisation_has_a_second_derivative() -> None:
    leaf = draw(3, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(normalize, (leaf,))


@pytest.mark.parametrize("scale", [0.0, 1e-13])
def test_a_vector_without_direction_becomes_zero_and_gets_no_gradient(scale: float) -> None:
    features = (torch.ones(2, 3, dtype=torch.float64) * scale).requires_grad_()
    value = normalize(features)
    value.sum().backward()
    assert not value.any()
    assert features.grad is not None
    assert not features.grad.any()


def test_nan_and_infinity_stay_visible_in_normalised_vectors() -> None:
    features = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [3.0, 4.0]])
    value = normalize(features)
    assert bool(value[:2].isnan().any(1).all())
    assert value[2].tolist() == pytest.approx([0.6, 0.8])
