"""ConsistencyLoss: features stay near those of a frozen reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.losses.base.contrastive import normalize
from diptych.losses.base.supervised import BaseSupervisedLoss
from diptych.losses.base.validation import check_choice, check_groups, check_pair, working_dtype
from diptych.losses.registry import register_loss


def _cosine(features: Tensor, reference: Tensor) -> Tensor:
    return 1 - (normalize(features) * normalize(reference)).sum(1)


def _l2(features: Tensor, reference: Tensor) -> Tensor:
    # The norm has a gradient of 0 at 0, where the root of a sum of squares has none.
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
    """Distance of features to a frozen reference's: distillation, or staying near a start.

    The mean over samples of 1 - cos (``cosine``, in [0, 2]), |f - r| (``l2``), sum_d |f_d - r_d|
    (``l1``) or sum_d of d^2 / 2 below 1 and |d| - 1/2 above (``smooth_l1``), d = f_d - r_d. It is
    >= 0. The reference gets no gradient.

    Called ``loss(features, reference)``, both [B, D].

    Across ranks: it is a mean over samples; nothing is gathered, ranks count by their samples.

    Source: Hinton et al. 2015, arXiv:1503.02531, for distillation; Girshick 2015,
    arXiv:1504.08083, for smooth L1.

    Args:
        distance: ``"cosine"``, ``"l2"``, ``"l1"`` or ``"smooth_l1"``.
        normalize: Whether both sides are divided by their L2 norm first; the cosine always does.

    Raises:
        ValueError: If `distance` is none of the four.
    """

    name: ClassVar[str] = "consistency"
    symmetric: ClassVar[bool] = True
    without_gradient: ClassVar[tuple[str, ...]] = ("reference",)

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
            groups: Integers [b]; accepted, so that tasks on pairs fit, and without effect.

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If features are not floating point.
        """
        check_pair(("features", "reference"), features, reference)
        if groups is not None:
            check_groups("groups", groups, features.shape[0])
        dtype = working_dtype(features, reference)
        features, reference = features.to(dtype), reference.detach().to(dtype)
        if self.normalize:
            features, reference = normalize(features), normalize(reference)
        distances = DISTANCES[self.distance](features, reference)
        return distances.sum(), torch.ones_like(distances).sum()

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return features and reference, [batch, dim] each, for the contract test."""
        return tuple(torch.randn(batch, dim, generator=generator) for _ in range(2))
