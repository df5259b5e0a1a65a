"""The loss that benchmarks compare with is the loss of the global batch."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peer_loss import peer_loss
from diptych.losses import CLIPLoss

SAMPLES, RANKS = 3, 2


def features() -> tuple[Tensor, Tensor]:
    """Return the features of the global batch."""
    torch.manual_seed(0)
    return tuple(torch.randn(RANKS * SAMPLES, 4, dtype=torch.float64) for _ in range(2))


def of_a_rank(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of a rank, and the gradient of its images."""
    image.requires_grad_()
    value = peer_loss(image, text, -torch.tensor(0.07, dtype=torch.float64).log())
    value.backward()
    return value.detach(), image.grad


def test_the_peers_loss_over_ranks_has_value_and_gradient_of_the_global_batch(ranks):
    image, text = features()
    shares = list(zip(image.split(SAMPLES), text.split(SAMPLES), strict=True))
    found = ranks.run(of_a_rank, shares)
    image.requires_grad_()
    expected = CLIPLoss()(image, text)
    expected.backward()
    torch.testing.assert_close(sum(value for value, _ in found) / RANKS, expected.detach())
    gradient = torch.cat([gradient for _, gradient in found]) / RANKS
    torch.testing.assert_close(gradient, image.grad)
