"""WeightedSum: several losses on the same outputs, added with fixed weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from diptych.losses.base.validation import check_at_least
from diptych.losses.combine.composite import MultipleLosses
from diptych.losses.contrastive.clip import CLIPLoss
from diptych.losses.contrastive.siglip import SigLIPLoss
from diptych.losses.registry import register_loss


@register_loss("weighted_sum")
class WeightedSum(MultipleLosses):
    """Sum of losses with fixed weights: sum_k w_k L_k.

    Called with the task's outputs: in order, which each part takes all, or by name, as a trainer
    calls it. By name, a part gets what it would get as the only loss, except what another part
    takes by name; a part whose required arguments are all named like outputs gets just these.
    `inputs` selects by position instead. The range is that of the parts. Terms: the weighted terms
    of each part, named after it.

    Across ranks: the parts communicate; their sum is exact if they are.

    Args:
        losses: The parts by name, or in a sequence, named as they are registered.
        weights: A number >= 0 for each part, by name or in the same order; None: 1. The attribute
            `weights` may be changed during training.
        inputs: For a part, the positions of the arguments that it takes, such as
            ``{"clip": (0, 1), "cross_entropy": (2, 3)}``.

    Raises:
        ValueError: If names or numbers of parts and weights differ, or a weight is < 0.
        TypeError: If a part is not an ``nn.Module``.
    """

    def __init__(
        self,
        *,
        losses: Mapping[str, nn.Module] | Sequence[nn.Module],
        weights: Mapping[str, float] | Sequence[float] | None = None,
        inputs: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(losses, inputs)
        if weights is None:
            weights = dict.fromkeys(self.losses, 1.0)
        elif not isinstance(weights, Mapping):
            if len(weights) != len(self.losses):
                raise ValueError(
                    f"weights must be as many as losses, {len(self.losses)}, got {len(weights)}"
                )
            weights = dict(zip(self.losses, weights, strict=True))
        if weights.keys() != self.losses.keys():
            raise ValueError(
                f"weights must name the losses {sorted(self.losses)}, got {sorted(weights)}"
            )
        for name, weight in weights.items():
            check_at_least(f"weights[{name!r}]", weight, 0)
        self.weights = {name: float(weights[name]) for name in self.losses}

    def part_weights(self) -> Mapping[str, float]:
        """Return all parts with their weights."""
        return self.weights

    @classmethod
    def example(cls) -> WeightedSum:
        """Return a small instance for the contract test."""
        return cls(losses=(CLIPLoss(), SigLIPLoss()), weights=(1.0, 0.5))
