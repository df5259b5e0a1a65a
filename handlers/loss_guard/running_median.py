"""Running medians of several series, and the limits above which a value is a spike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 0.1
"""Smallest spread relative to the median, so that small steps of steady values are no spikes."""


class RunningMedian:
    """Keeps the last values of several series on their device, and computes limits from them.

    The limit of a series is its median plus `factor` times its spread: the median distance from the
    median, or a tenth of the median if that is larger. The limit is infinite until the window is
    full. The host does not wait for the device, except in `to_lists`.

    Args:
        size: the window: values kept of each series, >= 1.
        factor: the largest accepted distance from the median, in spreads.

    Attributes:
        values: the window [series, size], oldest first; None before the first value. It is never
            changed in place.
    """

    def __init__(self, size: int, factor: float) -> None:
        self.size, self.factor = size, factor
        self.values: Tensor | None = None

    def limits(self, like: Tensor) -> Tensor:
        """Return the largest value of each series that is no spike.

        Args:
            like: a tensor [series] with the device and type of the result.
        """
        values = self._window(like)
        median = _lower_median(values)
        spread = _lower_median((values - median[:, None]).abs())
        limit = median + self.factor * torch.maximum(spread, FLOOR * median.abs())
        is_full = values[:, 0].isfinite()  # the oldest value
        return limit.where(is_full, torch.inf)

    def add(self, values: Tensor, accepted: Tensor) -> None:
        """Add a value of each series [series] if `accepted`, a boolean scalar tensor, is true."""
        window = self._window(values)
        moved = torch.cat([window[:, 1:], values[:, None]], dim=1)
        self.values = torch.where(accepted, moved, window)

    def reset(self) -> None:
        """Forget all values."""
        self.values = None

    def to_lists(self) -> list[list[float]]:
        """Return the values of each series, oldest first. The host waits for the device."""
        if self.values is None:
            return []
        return [row[row.isfinite()].tolist() for row in self.values.cpu()]

    def from_lists(self, lists: Sequence[Sequence[float]]) -> None:
        """Continue from the values that `to_lists` returned."""
        self.values = None
        if lists:
            kept = [list(values)[-self.size :] for values in lists]
            self.values = torch.tensor(
                [[torch.nan] * (self.size - len(values)) + values for values in kept],
                dtype=torch.float64,  # exact for series of any type
            )

    def _window(self, like: Tensor) -> Tensor:
        if self.values is None:
            self.values = like.new_full((len(like), self.size), torch.nan)
        elif self.values.device != like.device or self.values.dtype != like.dtype:
            self.values = self.values.to(like)
        return self.values


def _lower_median(values: Tensor) -> Tensor:
    # By sorting, because torch.median has no deterministic kernel on an accelerator.
    return values.sort(dim=1).values[:, (values.shape[1] - 1) // 2]
