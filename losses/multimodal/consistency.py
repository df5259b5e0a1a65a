"""ConsistencyLoss: distance of features to those of a frozen reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.losses.base.loss import Loss
from diptych.losses.base.normalization import normalize
from diptych.losses.base.supervised import BaseSupervisedLoss, detached_target
from diptych.losses.base.validation import check_choice
from diptych.losses.registry import register_loss


def _cosine(features: Tensor, reference: Tensor) -> Tensor:
    return 1 - (normalize(features) * normalize(reference)).sum(1)


def _l2(features: Tensor, reference: Tensor) -> Tensor:
    # vector_norm has a gradient of 0 at 0; the root of a sum of squares has NaN.
    distance: Tensor = torch.linalg.vector_norm(features - reference, dim=1)
    return distance


def _l1(features: Tensor, reference: Tensor) -> Tensor:
    return (features - reference).abs().sum(1)


def _smooth_l1(features: Tensor, reference: Tensor) -> Tensor:
    return F.smooth_l1_loss(features, reference, reduction="none").sum(1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine,
    "l2": _l2,
    "l1": _l1,
    "smooth_l1": _smooth_l1,
}


@register_loss("consistency")
class ConsistencyLoss(BaseSupervisedLoss):
    """Distance of features to a frozen reference's: distillation, or staying near initial weights.

    The mean over samples of 1 - cos (``cosine``, in [0, 2]), |f - r| (``l2``), sum_d |f_d - r_d|
    (``l1``) or sum_d of d^2 / 2 below 1 and |d| - 1/2 above (``smooth_l1``), d = f_d - r_d. It is
    >= 0. The reference gets no gradient.

    Called ``loss(features, reference)``, both [B, D].

    Across ranks: nothing is gathered; each rank counts by its number of samples.

    Source: Hinton et al. 2015, arXiv:1503.02531, for distillation; Girshick 2015,
    arXiv:1504.08083, for smooth L1.

    Args:
        distance: ``"cosine"``, ``"l2"``, ``"l1"`` or ``"smooth_l1"``.
        normalize: Whether both sides are divided by their L2 norm first; the cosine always does.

    Raises:
        ValueError: If `distance` is unknown.
    """

    name = "consistency"
    symmetric = True
    without_gradient = ("reference",)
    example_inputs = Loss.example_inputs

    def __init__(self, *, distance: str = "cosine", normalize: bool = True) -> None:
        super().__init__()
        check_choice("distance", distance, tuple(DISTANCES))
        self.distance = distance
        self.normalize = normalize

    def total_and_weight(
        self, features: Tensor, reference: Tensor, groups: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (sum of the distances, number of samples).

        Args:
            features: [b, D].
            reference: [b, D].
            groups: Integers [b]; accepted from tasks on pairs, without effect.

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If features are not floating point.
        """
        names = "features", "reference"
        features, reference = detached_target(names, features, reference, groups)
        if self.normalize:
            features, reference = normalize(features), normalize(reference)
        distances = DISTANCES[self.distance](features, reference)
        return distances.sum(), torch.ones_like(distances).sum()
