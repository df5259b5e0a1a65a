"""DecorrelationLoss: a penalty on correlated dimensions of a representation."""

from __future__ import annotations

from torch import Tensor

from diptych.losses.base.gather import GlobalBatch
from diptych.losses.base.objectives import off_diagonal
from diptych.losses.base.validation import check_choice, check_positive
from diptych.losses.base.views import ViewsLoss, centered, second_moment
from diptych.losses.registry import register_loss


@register_loss("decorrelation")
class DecorrelationLoss(ViewsLoss):
    """Penalty on the covariance, or correlation, between the dimensions of each side.

    sum_v (sum_{i != j} C_ij^2) / D with C the unbiased covariance (B - 1) of a side, or its
    correlation: C_ij / sqrt((C_ii + eps) (C_jj + eps)). All sides are added. Features are
    not normalised, which would shrink the covariance to almost 0. It is >= 0, and 0 for
    uncorrelated dimensions. `groups` are accepted and have no effect: there are no negatives.

    Called with one side, ``loss(features)``, with two, or with several views [b, V, D].

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
        super().__init__()
        check_choice("kind", kind, ("covariance", "correlation"))
        check_positive("epsilon", epsilon)
        self.kind = kind
        self.epsilon = epsilon

    def objective(self, views: Tensor, batch: GlobalBatch) -> dict[str, Tensor]:
        """Return {"decorrelation": the sum over all sides}."""
        sides = centered(views, batch)
        matrices = second_moment(sides, sides, batch, ddof=1)
        if self.kind == "correlation":
            spreads = (matrices.diagonal(dim1=1, dim2=2) + self.epsilon).sqrt()
            matrices = matrices / (spreads[:, :, None] * spreads[:, None, :])
        return {"decorrelation": off_diagonal(matrices).square().sum() / views.shape[2]}
