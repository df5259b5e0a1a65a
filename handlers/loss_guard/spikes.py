"""What counts as a spike: a value far above the median of those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 0.1
"""Least spread, relative to the median: values that hardly vary make no spike of a small step."""


class RunningMedian:
    """The last values of several series, on their device, and the limits that follow from them.

    A series' limit is its median plus `factor` times its spread, which is the median distance from
    the median, or a tenth of the median's size where that is more. There is none (infinity) until
    as many values as the window holds have come. Nothing waits for the device.

    Args:
        size: values of a series that are kept, >= 1.
        factor: spreads above the median that a value may lie.
    """

    def __init__(self, size: int, factor: float) -> None:
        self.size, self.factor = size, factor
        self._values: Tensor | None = None

    def limits(self, like: Tensor) -> Tensor:
        """Return the largest value that is no spike, for each series.

        Args:
            like: values [series], of whose device and type the result is.
        """
        values = self._window(like)
        median = _middle(values)
        spread = _middle((values - median[:, None]).abs())
        limit = median + self.factor * torch.maximum(spread, FLOOR * median.abs())
        return limit.where(values[:, 0].isfinite(), torch.inf)  # the oldest: the window is full

    def add(self, values: Tensor, accepted: Tensor) -> None:
        """Take in a value of each series [series], where `accepted`, a boolean scalar, is true."""
        window = self._window(values)
        moved = torch.cat([window[:, 1:], values[:, None]], dim=1)
        self._values = torch.where(accepted, moved, window)

    def reset(self) -> None:
        """Forget all values."""
        self._values = None

    def to_lists(self) -> list[list[float]]:
        """Return the values of each series, the oldest first; waits for the device."""
        if self._values is None:
            return []
        return [row[row.isfinite()].tolist() for row in self._values.cpu()]

    def from_lists(self, lists: Sequence[Sequence[float]]) -> None:
        """Go on from what `to_lists` returned."""
        self._values = None
        if lists:
            kept = [list(values)[-self.size :] for values in lists]
            self._values = torch.tensor(
                [[torch.nan] * (self.size - len(values)) + values for values in kept]
            )

    def _window(self, like: Tensor) -> Tensor:
        if self._values is None:
            self._values = like.new_full((len(like), self.size), torch.nan)
        elif self._values.device != like.device or self._values.dtype != like.dtype:
            self._values = self._values.to(like)
        return self._values


def _middle(values: Tensor) -> Tensor:
    # Sorted, since torch's median has no deterministic kernel on an accelerator.
    return values.sort(dim=1).values[:, (values.shape[1] - 1) // 2]
