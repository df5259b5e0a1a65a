"""BarlowTwinsLoss: the distance of views' cross-correlation from the identity."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from diptych.losses.base.gather import GlobalBatch
from diptych.losses.base.objectives import off_diagonal
from diptych.losses.base.validation import check_at_least, check_positive
from diptych.losses.base.views import ViewsLoss, centered, second_moment, variance
from diptych.losses.registry import register_loss


@register_loss("barlow_twins")
class BarlowTwinsLoss(ViewsLoss):
    """Distance of the cross-correlation of two views from the identity (Barlow Twins).

    sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2 with C = norm(a).T norm(b) / B, where norm
    standardises each dimension over the batch (biased variance, eps inside the root, like batch
    normalisation without affine parameters). It is >= 0 and grows with D. Terms:
    `invariance` (the diagonal) and `redundancy`. `groups` are accepted and have no effect:
    there are no negatives.

    With more than two views, ``loss(views)`` of [b, V, D], it is the mean of this over all pairs of
    views.

    Across ranks: mean, variance and C come from sums over ranks, with gradient, D x D numbers for
    each pair of views.
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
    minimum_views = 2

    def __init__(self, *, redundancy_weight: float = 0.005, epsilon: float = 1e-5) -> None:
        super().__init__()
        check_at_least("redundancy_weight", redundancy_weight, 0)
        check_positive("epsilon", epsilon)
        self.redundancy_weight = redundancy_weight
        self.epsilon = epsilon

    def objective(self, views: Tensor, batch: GlobalBatch) -> dict[str, Tensor]:
        """Return the two weighted terms."""
        sides = centered(views, batch)
        sides = sides / (variance(sides, batch) + self.epsilon).sqrt()
        pairs = zip(*combinations(sides, 2), strict=True)
        first, second = (torch.stack(side) for side in pairs)
        correlations = second_moment(first, second, batch)
        diagonals = correlations.diagonal(dim1=1, dim2=2)
        redundancy = off_diagonal(correlations).square().sum(1).mean()
        return {
            "invariance": (diagonals - 1).square().sum(1).mean(),
            "redundancy": self.redundancy_weight * redundancy,
        }
