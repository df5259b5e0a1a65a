"""BaseSupervisedLoss: base of the losses that are a weighted mean over samples."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from diptych.losses.base.gather import sum_over_ranks, world_size
from diptych.losses.base.loss import Loss
from diptych.losses.base.validation import check_groups, check_pair, working_dtype


class BaseSupervisedLoss(Loss):
    """Base of the losses that are a sum over samples divided by a sum of weights.

    A subclass defines `total_and_weight`. The exact value over ranks (each rank's total counts by
    its weight) and over micro-batches, which the training step accumulates, follows from it.

    Attributes:
        couples_samples: False: the step may accumulate the loss over micro-batches.
        name: Name of the loss's only term.
    """

    couples_samples: ClassVar[bool] = False
    name: ClassVar[str] = "supervised"

    def total_and_weight(self, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Return (sum of losses, sum of weights) of these samples alone, two 0-dim tensors.

        Nothing is communicated. The loss is the sum of the totals divided by the sum of the
        weights, over micro-batches and over ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} must define total_and_weight")

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Return the weighted mean over all samples of all ranks, a scalar; 0 if all weights are 0.

        The value averages over ranks to that of the global batch.

        Args:
            *inputs: The arguments of `total_and_weight`.
            **named: The arguments of `total_and_weight`, by name.
        """
        device = next(iter((*inputs, *named.values()))).device
        with torch.autocast(device.type, enabled=False):
            total, weight = self.total_and_weight(*inputs, **named)
        weight = sum_over_ranks(weight.detach())
        # If all weights are 0, the total is 0 too, and any divisor gives the intended 0.
        return total * world_size() / torch.where(weight == 0, 1, weight)

    def terms(self, *inputs: Tensor, **named: Tensor) -> dict[str, Tensor]:
        """Return the loss as its only term."""
        return {self.name: self(*inputs, **named)}

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return the arguments of one call: logits [batch, dim], float32, and labels [batch]."""
        logits = torch.randn(batch, dim, generator=generator)
        return logits, torch.randint(dim, (batch,), generator=generator)


def detached_target(
    names: tuple[str, str], features: Tensor, target: Tensor, groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return validated features and their target [b, D] in the working dtype, the target detached.

    Args:
        names: Names of features and target in error messages.
        features: [b, D].
        target: [b, D].
        groups: Integers [b]; validated only.
    """
    check_pair(names, features, target)
    check_groups("groups", groups, features.shape[0])
    dtype = working_dtype(features, target)
    return features.to(dtype), target.detach().to(dtype)
