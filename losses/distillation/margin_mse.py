"""MarginMSELoss: a teacher's margins between a positive and negatives as the student's target."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.normalization import normalize
from diptych.losses.base.supervised import BaseSupervisedLoss
from diptych.losses.base.validation import check_floating, check_pair, check_views, working_dtype
from diptych.losses.registry import register_loss


@register_loss("margin_mse")
class MarginMSELoss(BaseSupervisedLoss):
    """Squared error of the margin by which a query prefers its positive to a negative (MarginMSE).

    Called ``loss(query, positive, negatives, teacher_margins)``: the mean over queries and their
    negatives of [(q.p - q.n) - (t(q, p) - t(q, n))]^2. The teacher's margins come with the data,
    from a cross encoder for example; for scores t, subtract those of the negatives. It is >= 0.

    Across ranks: nothing is gathered; each rank counts by its number of margins.

    Source: Hofstätter et al. 2020, arXiv:2010.02666.

    Args:
        normalize: Whether the loss normalises the features, so that it compares cosines; the paper
            compares dot products, whose range the teacher's margins may need.
    """

    name = "margin_mse"
    without_gradient = ("teacher_margins",)

    def __init__(self, *, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize

    def total_and_weight(
        self, query: Tensor, positive: Tensor, negatives: Tensor, teacher_margins: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (sum of the squared errors, number of margins).

        Args:
            query: [b, D].
            positive: [b, D].
            negatives: [b, D], or [b, k, D] with k negatives of each query.
            teacher_margins: [b] or [b, k], t(q, p) - t(q, n); no gradient.

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If an argument is not floating point.
        """
        check_pair(("query", "positive"), query, positive)
        check_views("negatives", negatives, middle="k")
        check_floating("teacher_margins", teacher_margins)
        size, dim = query.shape
        if (negatives.shape[0], negatives.shape[-1]) != (size, dim):
            raise ValueError(
                f"negatives must be [{size}, {dim}] or [{size}, k, {dim}], as query, got shape"
                f" {tuple(negatives.shape)}"
            )
        if teacher_margins.shape != negatives.shape[:-1]:
            raise ValueError(
                f"teacher_margins must be {list(negatives.shape[:-1])}, one for each negative, got"
                f" shape {tuple(teacher_margins.shape)}"
            )
        dtype = working_dtype(query, positive, negatives)
        sides = [x.to(dtype) for x in (query, positive, negatives)]
        query, positive, negatives = [normalize(x) for x in sides] if self.normalize else sides
        if negatives.dim() == 3:
            query, positive = query[:, None], positive[:, None]
        margins = (query * positive).sum(-1) - (query * negatives).sum(-1)
        errors = (margins - teacher_margins.detach().to(dtype)) ** 2
        return errors.sum(), torch.ones_like(errors).sum()

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return a batch with `dim` negatives of each query, for the contract test."""
        return tuple(
            torch.randn(batch, *shape, generator=generator)
            for shape in ((dim,), (dim,), (dim, dim), (dim,))
        )
