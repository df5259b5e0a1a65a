"""DecorrelationLoss: a penalty on correlated dimensions of a representation."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.moments import centered, second_moment
from diptych.losses.base.objectives import off_diagonal
from diptych.losses.base.validation import check_choice, check_positive
from diptych.losses.registry import register_loss


@register_loss("decorrelation")
class DecorrelationLoss(BaseContrastiveLoss):
    """Penalty on the covariance, or correlation, between the dimensions of each side.

    sum_v (sum_{i != j} C_ij^2) / D with C the unbiased covariance (B - 1) of a side, or its
    correlation: C_ij / sqrt((C_ii + eps) (C_jj + eps)). Both sides are added. Features are
    not normalised, which would shrink the covariance to almost 0. It is >= 0, and 0 for
    uncorrelated dimensions. `groups` are accepted and have no effect: there are no negatives.

    Called with one side, ``loss(features)``, or with two.

    Across ranks: mean and covariance come from sums over ranks, with gradient, D x D numbers.
    Exact for uneven local batches.

    Source: the covariance term of Bardes et al. 2022, arXiv:2105.04906; Cogswell et al. 2016,
    arXiv:1511.06068.

    Args:
        kind: ``"covariance"`` or ``"correlation"``.
        epsilon: Added to variances, > 0, for ``"correlation"``.

    Raises:
        ValueError: If an argument is out of range, or if the global batch is a single sample, which
            has no covariance.
    """

    symmetric = True
    minimum_batch = 2

    def __init__(self, *, kind: str = "covariance", epsilon: float = 1e-5) -> None:
        super().__init__(temperature=1.0, normalize=False)
        check_choice("kind", kind, ("covariance", "correlation"))
        check_positive("epsilon", epsilon)
        self.kind = kind
        self.epsilon = epsilon

    def forward(
        self, first: Tensor, second: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """Return the loss of one side, or the sum of both sides' losses, a scalar.

        Args:
            first: [b, D].
            second: [b, D], or None.
            groups: Has no effect.

        Raises:
            ValueError: If shapes do not fit, or the global batch is a single sample.
            TypeError: If features are not floating point or groups not integers.
        """
        return self.terms(first, second, groups)["decorrelation"]

    def terms(
        self, first: Tensor, second: Tensor | None = None, groups: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {"decorrelation": the loss}. Arguments as for `forward`."""
        if second is not None:
            return super().terms(first, second, groups)
        pairs = self.prepare(first, first, groups)
        with torch.autocast(first.device.type, enabled=False):
            return {"decorrelation": self._side(pairs.first, pairs)}

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return {"decorrelation": the sum of both sides}."""
        return {"decorrelation": self._side(pairs.first, pairs) + self._side(pairs.second, pairs)}

    def _side(self, features: Tensor, pairs: Pairs) -> Tensor:
        side = centered(features, pairs.batch)
        matrix = second_moment(side, side, pairs.batch, ddof=1)
        if self.kind == "correlation":
            spread = (matrix.diagonal() + self.epsilon).sqrt()
            matrix = matrix / (spread[:, None] * spread[None, :])
        return off_diagonal(matrix).square().sum() / features.shape[1]
