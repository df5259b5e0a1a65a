"""BaseSupervisedLoss: losses that are a weighted mean over samples."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diptych.losses.base.gather import sum_over_ranks, world_size


class BaseSupervisedLoss(nn.Module):
    """Base of the losses that are a sum over samples divided by a sum of weights.

    A subclass writes `total_and_weight`; from it follow the exact value over ranks (each rank's
    total counts by its weight, not by its rank) and over pieces of a batch, which the training
    step accumulates.

    Attributes:
        couples_samples: False: the step may accumulate the loss piece by piece.
        symmetric: Whether swapping the first two arguments leaves the value unchanged.
        minimum_batch: The least global batch for which the loss is defined.
        without_gradient: Names of inputs through which no gradient flows.
        name: The name of the loss's one term.
    """

    couples_samples: ClassVar[bool] = False
    symmetric: ClassVar[bool] = False
    minimum_batch: ClassVar[int] = 1
    without_gradient: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = "supervised"

    def total_and_weight(self, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Return (sum of losses, sum of weights) of these samples alone, two 0-dim tensors.

        Nothing is communicated. The loss is the sum of totals divided by the sum of weights, over
        pieces and over ranks.
        """
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the weighted mean over all samples of all ranks, a scalar; 0 if nothing weighs.

        The value averages over ranks to that of the global batch.
        """
        with torch.autocast(inputs[0].device.type, enabled=False):
            total, weight = self.total_and_weight(*inputs)
        weight = sum_over_ranks(weight.detach())
        # Where all weights are 0 so is the total: any divisor gives the 0 that is meant.
        return total * world_size() / torch.where(weight == 0, 1, weight)

    def terms(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return the loss as its one term."""
        return {self.name: self(*inputs)}

    @classmethod
    def example(cls) -> BaseSupervisedLoss:
        """Return a small instance for the contract test; override it if arguments are required."""
        return cls()

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return the arguments of one call, logits [batch, dim] and labels [batch], float32."""
        logits = torch.randn(batch, dim, generator=generator)
        return logits, torch.randint(dim, (batch,), generator=generator)
