"""VICRegLoss: invariance, variance and covariance of two or more views."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from diptych.losses.base.gather import GlobalBatch
from diptych.losses.base.objectives import off_diagonal
from diptych.losses.base.validation import check_at_least, check_positive
from diptych.losses.base.views import ViewsLoss, centered, second_moment
from diptych.losses.registry import register_loss


@register_loss("vicreg")
class VICRegLoss(ViewsLoss):
    """Variance, invariance and covariance of two or more views, without negatives (VICReg).

    25 MSE(a, b) + 25 * 1/2 sum_v mean_d relu(1 - sqrt(var_d + eps)) + 1 * sum_v (sum_{i != j}
    C_ij^2) / D, where the MSE is the mean over B x D, var and C are unbiased (B - 1), the variance
    term is averaged over the two views and the covariance term is added up. Features are not
    normalised and, for the MSE, not centred. It is >= 0. Terms: `invariance`,
    `variance`, `covariance`. `groups` are accepted and have no effect: there are no negatives.

    With more than two views, ``loss(views)`` of [b, V, D], it is the mean of this over all pairs of
    views.

    Across ranks: mean and covariance come from sums over ranks, with gradient, V x D x D numbers;
    nothing else is communicated. Exact for uneven local batches.

    Source: Bardes et al. 2022, arXiv:2105.04906.

    Args:
        invariance_weight: >= 0.
        variance_weight: >= 0.
        covariance_weight: >= 0.
        epsilon: Inside the root, > 0.

    Raises:
        ValueError: If an argument is out of range, or if the global batch is a single sample, which
            has no variance.
    """

    symmetric = True
    minimum_batch = 2
    minimum_views = 2

    def __init__(
        self,
        *,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        epsilon: float = 1e-4,
    ) -> None:
        super().__init__()
        check_at_least("invariance_weight", invariance_weight, 0)
        check_at_least("variance_weight", variance_weight, 0)
        check_at_least("covariance_weight", covariance_weight, 0)
        check_positive("epsilon", epsilon)
        self.invariance_weight = invariance_weight
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight
        self.epsilon = epsilon

    def objective(self, views: Tensor, batch: GlobalBatch) -> dict[str, Tensor]:
        """Return the three weighted terms."""
        # Over all pairs, the squared distances add up to V times those to the mean.
        distances = (views - views.mean(0)).square().sum(0) * 2 / (len(views) - 1)
        sides = centered(views, batch)
        covariances = second_moment(sides, sides, batch, ddof=1)
        spreads = (covariances.diagonal(dim1=1, dim2=2) + self.epsilon).sqrt()
        shared = off_diagonal(covariances).square().sum(1).mean() / views.shape[2]
        return {
            "invariance": self.invariance_weight * batch.mean(distances.mean(1)),
            "variance": self.variance_weight * F.relu(1 - spreads).mean(),
            "covariance": self.covariance_weight * 2 * shared,
        }
