"""VICRegLoss: invariance, variance and covariance of two views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.moments import centered, second_moment
from diptych.losses.base.objectives import off_diagonal
from diptych.losses.base.validation import check_at_least, check_positive
from diptych.losses.registry import register_loss


@register_loss("vicreg")
class VICRegLoss(BaseContrastiveLoss):
    """Variance, invariance and covariance of two views, without negatives (VICReg).

    25 MSE(a, b) + 25 * 1/2 sum_v mean_d relu(1 - sqrt(var_d + eps)) + 1 * sum_v (sum_{i != j}
    C_ij^2) / D, where the MSE is the mean over B x D, var and C are unbiased (B - 1), the variance
    term is averaged over the two views and the covariance term is added up. Features are not
    normalised and, for the MSE, not centred. It is >= 0. Terms: `invariance`,
    `variance`, `covariance`. `groups` are accepted and have no effect: there are no negatives.

    Across ranks: mean and covariance come from sums over ranks, with gradient, D x D numbers;
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

    def __init__(
        self,
        *,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        epsilon: float = 1e-4,
    ) -> None:
        super().__init__(temperature=1.0, normalize=False)
        check_at_least("invariance_weight", invariance_weight, 0)
        check_at_least("variance_weight", variance_weight, 0)
        check_at_least("covariance_weight", covariance_weight, 0)
        check_positive("epsilon", epsilon)
        self.invariance_weight = invariance_weight
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight
        self.epsilon = epsilon

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return the three weighted terms."""
        batch = pairs.batch
        dim = pairs.first.shape[1]
        invariance = batch.mean((pairs.first - pairs.second).square().mean(1))
        covariances = [
            second_moment(side, side, batch, ddof=1)
            for side in (centered(pairs.first, batch), centered(pairs.second, batch))
        ]
        spreads = [(matrix.diagonal() + self.epsilon).sqrt() for matrix in covariances]
        lacking = torch.stack([F.relu(1 - spread) for spread in spreads])
        shared = torch.stack([off_diagonal(matrix) for matrix in covariances])
        return {
            "invariance": self.invariance_weight * invariance,
            "variance": self.variance_weight * lacking.mean(),
            "covariance": self.covariance_weight * shared.square().sum() / dim,
        }
