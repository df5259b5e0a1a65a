"""UncertaintyWeighted: several losses, added with weights that are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diptych.losses.combine.composite import MultipleLosses
from diptych.losses.contrastive.clip import CLIPLoss
from diptych.losses.contrastive.siglip import SigLIPLoss
from diptych.losses.registry import register_loss


@register_loss("uncertainty")
class UncertaintyWeighted(MultipleLosses):
    """Losses weighted by learned uncertainty: sum_k [e^{-s_k} L_k + s_k / 2].

    s_k = log sigma_k^2, the logarithm of task k's noise, starts at 0 (weight 1) and settles where
    e^{-s_k} = 1 / (2 L_k): losses of any size end up with equal shares. The value can be negative.
    Terms: each part's, weighted, and `log_variance`, the sum of s_k / 2.

    A loss that can be negative is refused: s would run to minus infinity on it. The package's own
    are known; a loss of one's own says so by ``can_be_negative = True``.

    Across ranks: the parts see to it; the gradient of s is averaged as that of any parameter.

    Source: Kendall et al. 2018, arXiv:1705.07115.

    Args:
        losses: The parts by name, or in a sequence, named as they are registered.
        inputs: For a part, the positions of the arguments that it takes, as for `WeightedSum`.

    Attributes:
        log_variances: s, [K], in the order of the parts. Give it no weight decay, which would
            pull every weight to 1.

    Raises:
        ValueError: If a part can be negative, or for what `WeightedSum` refuses.
        TypeError: If a part is no ``nn.Module``.
    """

    can_be_negative = True

    def __init__(
        self,
        *,
        losses: Mapping[str, nn.Module] | Sequence[nn.Module],
        inputs: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(losses, inputs)
        for name, loss in self.losses.items():
            signed = [
                type(x).__name__ for x in loss.modules() if getattr(x, "can_be_negative", False)
            ]
            if signed:
                raise ValueError(
                    f"losses must not be negative, got {name!r} with {signed[0]}: its weight would"
                    " grow without bound; give it a fixed weight in a WeightedSum"
                )
        self.log_variances = nn.Parameter(torch.zeros(len(self.losses)))

    @property
    def couples_samples(self) -> bool:
        """True: beside s, the value is no mean over samples."""
        return True

    def terms(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return every part's terms, weighted, and `log_variance`.

        Args:
            *inputs: What the task gives.
        """
        terms: dict[str, Tensor] = {}
        weights = (-self.log_variances).exp()
        for name, weight in zip(self.losses, weights, strict=True):
            terms |= self.part_terms(name, weight, *self.inputs_of(name, inputs))
        return {**terms, "log_variance": self.log_variances.sum() / 2}

    def scalars(self) -> dict[str, Tensor]:
        """Return the parts' scalars and each part's weight e^{-s}, detached, for logs."""
        weights = (-self.log_variances.detach()).exp()
        return {
            **super().scalars(),
            **{f"{name}/weight": w for name, w in zip(self.losses, weights, strict=True)},
        }

    @classmethod
    def example(cls) -> UncertaintyWeighted:
        """Return a small instance for the contract test."""
        return cls(losses=(CLIPLoss(), SigLIPLoss()))
