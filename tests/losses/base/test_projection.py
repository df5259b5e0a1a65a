"""A projection is a perceptron with the requested layers."""

import pytest
import torch
from torch import nn

from diptych.losses import Projection


@pytest.mark.parametrize("normalization", ["none", "layer", "batch"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_it_has_the_requested_layers_and_sizes(layers: int, normalization: str) -> None:
    projection = Projection(
        input_dim=6, output_dim=3, hidden_dim=5, layers=layers, normalization=normalization
    )
    assert sum(isinstance(module, nn.Linear) for module in projection) == layers
    assert projection(torch.randn(4, 6)).shape == (4, 3)


def test_the_plain_form_is_linear_relu_linear() -> None:
    projection = Projection(input_dim=4, output_dim=2)
    features = torch.randn(3, 4)
    hidden = (features @ projection[0].weight.T + projection[0].bias).relu()
    torch.testing.assert_close(
        projection(features), hidden @ projection[2].weight.T + projection[2].bias
    )


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="layers must be >= 1, got 0"):
        Projection(input_dim=4, output_dim=2, layers=0)
    with pytest.raises(ValueError, match="normalization must be one of"):
        Projection(input_dim=4, output_dim=2, normalization="group")
