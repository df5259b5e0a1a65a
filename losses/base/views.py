"""ViewsLoss: base of the losses on any number of views; moments of views over the global batch."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from diptych.losses.base.gather import GlobalBatch, global_batch, sum_over_ranks
from diptych.losses.base.loss import Loss, sum_of_terms
from diptych.losses.base.validation import (
    check_groups,
    check_pair,
    check_two_views,
    check_views,
    working_dtype,
)


class ViewsLoss(Loss):
    """Base of the losses that are called ``loss(first, second=None, groups=None)``.

    Each argument is one view of the samples, [b, D], or several, [b, V, D]; the views are those of
    `first`, then those of `second`. A subclass defines `objective(views, batch)`.

    Attributes:
        couples_samples: True: the loss of a batch is more than a mean over its samples.
        minimum_views: The smallest number of views for which the loss is defined.
    """

    couples_samples: ClassVar[bool] = True
    minimum_views: ClassVar[int] = 1

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, first: Tensor, second: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a scalar that averages over ranks to that of the global batch.

        Args:
            first: [b, D] or [b, V, D], floating point.
            second: More views, [b, D] or [b, V', D]; None: `first` has all of them.
            groups: Has no effect.

        Raises:
            ValueError: If shapes do not fit, there are too few views, or the global batch is below
                `minimum_batch`.
            TypeError: If features are not floating point or groups not integers.
        """
        return sum_of_terms(self.terms(first, second, groups))

    def terms(
        self, first: Tensor, second: Tensor | None = None, groups: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the named, weighted parts whose sum is the loss. Arguments as for `forward`."""
        sides = _checked(first, second)
        views = sum(1 if side.dim() == 2 else side.shape[1] for side in sides)
        check_groups("groups", groups, first.shape[0])
        if views < self.minimum_views:
            raise ValueError(
                f"first and second must have at least {self.minimum_views} views together, got"
                f" {views}. Pass [batch, views, features], or a second side."
            )
        batch = global_batch(first.shape[0], feature_dimension=first.shape[-1], views=views)
        if batch.total < self.minimum_batch:
            raise ValueError(
                f"{type(self).__name__} needs a global batch of at least {self.minimum_batch},"
                f" got {batch.total}. Use larger batches, or drop the last, incomplete one."
            )
        with torch.autocast(first.device.type, enabled=False):
            dtype = working_dtype(*sides)
            stacked = [
                side.to(dtype) if side.dim() == 3 else side.to(dtype)[:, None] for side in sides
            ]
            return self.objective(torch.cat(stacked, dim=1).transpose(0, 1), batch)

    def objective(self, views: Tensor, batch: GlobalBatch) -> dict[str, Tensor]:
        """Return the named terms, which average over ranks to the global ones.

        Args:
            views: [V, b, D], float32 or float64; autocast is off.
            batch: Sizes of all ranks; gathers with gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} must define objective")


def _checked(first: Tensor, second: Tensor | None) -> list[Tensor]:
    """Return the sides that were passed, validated."""
    if second is None:
        check_views("first", first)
        return [first]
    several = any(isinstance(side, Tensor) and side.dim() == 3 for side in (first, second))
    (check_two_views if several else check_pair)(("first", "second"), first, second)
    return [first, second]


def centered(features: Tensor, batch: GlobalBatch) -> Tensor:
    """Return this rank's features [..., b, D] minus the mean over all ranks' samples."""
    return features - sum_over_ranks(features.sum(-2, keepdim=True)) / batch.total


def second_moment(left: Tensor, right: Tensor, batch: GlobalBatch, *, ddof: int = 0) -> Tensor:
    """Return the sum over all ranks' samples of left_i right_j over B - ddof, [..., D, E].

    For centred features this is the covariance, unbiased with ``ddof=1``. Every rank holds the
    whole matrix; D x E numbers are communicated for any batch size.

    Args:
        left: [..., b, D].
        right: [..., b, E].
        batch: Sizes of all ranks.
        ddof: The number subtracted from the count.
    """
    return sum_over_ranks(left.mT @ right) / (batch.total - ddof)


def variance(features: Tensor, batch: GlobalBatch) -> Tensor:
    """Return the biased variance over all ranks of centred features [..., b, D], [..., 1, D]."""
    return sum_over_ranks(features.square().sum(-2, keepdim=True)) / batch.total
