"""NegativeCosineLoss: alignment of predictions with targets, without negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.loss import Loss
from diptych.losses.base.normalization import normalize
from diptych.losses.base.supervised import BaseSupervisedLoss, detached_target
from diptych.losses.base.validation import check_choice
from diptych.losses.registry import register_loss


@register_loss("negative_cosine")
class NegativeCosineLoss(BaseSupervisedLoss):
    """Negative cosine similarity of predictions and detached targets (SimSiam, BYOL).

    Called ``loss(predictions, targets)``: the mean of -cos(p, z) (``simsiam``, in [-1, 1]), or of
    2 - 2 cos(p, z) (``byol``, in [0, 4]: the squared distance of unit vectors). The loss detaches
    the targets. To symmetrise, concatenate: ``loss(cat(p1, p2), cat(z2,
    z1))`` is the mean of both directions. `groups` are accepted and change nothing: there are no
    negatives.

    Across ranks: nothing is gathered; each rank counts by its number of samples.

    Source: Chen and He 2021, arXiv:2011.10566; Grill et al. 2020, arXiv:2006.07733.

    Args:
        kind: ``"simsiam"`` or ``"byol"``.

    Raises:
        ValueError: If `kind` is neither.
    """

    name = "negative_cosine"
    without_gradient = ("targets",)
    example_inputs = Loss.example_inputs

    def __init__(self, *, kind: str = "simsiam") -> None:
        super().__init__()
        check_choice("kind", kind, ("simsiam", "byol"))
        self.kind = kind

    @property
    def can_be_negative(self) -> bool:
        """Whether the value can be below 0."""
        return self.kind == "simsiam"

    def total_and_weight(
        self, predictions: Tensor, targets: Tensor, groups: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (sum over samples, number of samples).

        Args:
            predictions: [b, D].
            targets: [b, D]; gets no gradient.
            groups: Has no effect.

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If features are not floating point.
        """
        names = "predictions", "targets"
        predictions, targets = detached_target(names, predictions, targets, groups)
        cosine = (normalize(predictions) * normalize(targets)).sum(1)
        values = -cosine if self.kind == "simsiam" else 2 - 2 * cosine
        return values.sum(), torch.full_like(values, 1).sum()
