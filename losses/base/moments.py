"""Moments over the global batch, from sums over ranks, with gradient."""

from __future__ import annotations

from torch import Tensor

from diptych.losses.base.gather import GlobalBatch, sum_over_ranks


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
