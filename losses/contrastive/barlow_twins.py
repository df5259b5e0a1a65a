"""BarlowTwinsLoss: the distance of two views' cross-correlation from the identity."""

from __future__ import annotations

from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.moments import centered, second_moment, variance
from diptych.losses.base.objectives import off_diagonal
from diptych.losses.base.validation import check_at_least, check_positive
from diptych.losses.registry import register_loss


@register_loss("barlow_twins")
class BarlowTwinsLoss(BaseContrastiveLoss):
    """Distance of the cross-correlation of two views from the identity (Barlow Twins).

    sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2 with C = norm(a).T norm(b) / B, where norm
    standardises each dimension over the batch (biased variance, eps inside the root, like batch
    normalisation without affine parameters). It is >= 0 and grows with D. Terms:
    `invariance` (the diagonal) and `redundancy`. `groups` are accepted and have no effect:
    there are no negatives.

    Across ranks: mean, variance and C come from sums over ranks, with gradient, D x D numbers.
    Exact for uneven local batches.

    Source: Zbontar et al. 2021, arXiv:2103.03230.

    Args:
        redundancy_weight: lambda, >= 0.
        epsilon: Added to the variance, > 0.

    Raises:
        ValueError: If an argument is out of range, or if the global batch is a single sample, which
            has no variance.
    """

    symmetric = True
    minimum_batch = 2

    def __init__(self, *, redundancy_weight: float = 0.005, epsilon: float = 1e-5) -> None:
        super().__init__(temperature=1.0, normalize=False)
        check_at_least("redundancy_weight", redundancy_weight, 0)
        check_positive("epsilon", epsilon)
        self.redundancy_weight = redundancy_weight
        self.epsilon = epsilon

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return the two weighted terms."""
        batch = pairs.batch
        sides = [centered(side, batch) for side in (pairs.first, pairs.second)]
        first, second = (side / (variance(side, batch) + self.epsilon).sqrt() for side in sides)
        correlation = second_moment(first, second, batch)
        return {
            "invariance": (correlation.diagonal() - 1).square().sum(),
            "redundancy": self.redundancy_weight * off_diagonal(correlation).square().sum(),
        }
