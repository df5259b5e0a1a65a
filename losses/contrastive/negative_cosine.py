"""NegativeCosineLoss: a prediction points where its target points."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from diptych.losses.base.contrastive import normalize
from diptych.losses.base.supervised import BaseSupervisedLoss
from diptych.losses.base.validation import check_choice, check_groups, check_pair, working_dtype
from diptych.losses.registry import register_loss


@register_loss("negative_cosine")
class NegativeCosineLoss(BaseSupervisedLoss):
    """Negative cosine similarity between predictions and targets without gradient (SimSiam, BYOL).

    Called ``loss(predictions, targets)``: the mean of -cos(p, z) (``simsiam``, in [-1, 1]), or of
    2 - 2 cos(p, z) (``byol``, in [0, 4]: the squared distance of unit vectors). The stop-gradient
    on the targets is part of the loss. To symmetrise, concatenate: ``loss(cat(p1, p2), cat(z2,
    z1))`` is the mean of both directions. `groups` are accepted and change nothing: there are no
    negatives.

    Across ranks: it is a mean over samples; nothing is gathered, ranks count by their samples.

    Source: Chen and He 2021, arXiv:2011.10566; Grill et al. 2020, arXiv:2006.07733.

    Args:
        kind: ``"simsiam"`` or ``"byol"``.

    Raises:
        ValueError: If `kind` is neither.
    """

    name: ClassVar[str] = "negative_cosine"
    without_gradient: ClassVar[tuple[str, ...]] = ("targets",)

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
            groups: Changes nothing.

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If features are not floating point.
        """
        check_pair(("predictions", "targets"), predictions, targets)
        if groups is not None:
            check_groups("groups", groups, predictions.shape[0])
        dtype = working_dtype(predictions, targets)
        sides = (normalize(predictions.to(dtype)), normalize(targets.detach().to(dtype)))
        cosine = (sides[0] * sides[1]).sum(1)
        values = -cosine if self.kind == "simsiam" else 2 - 2 * cosine
        return values.sum(), torch.full_like(values, 1).sum()

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return predictions and targets, [batch, dim] each."""
        return tuple(torch.randn(batch, dim, generator=generator) for _ in range(2))
