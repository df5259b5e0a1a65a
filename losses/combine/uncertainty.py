"""UncertaintyWeighted: several losses, added with learned weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from diptych.losses.base.loss import with_defaults
from diptych.losses.combine.composite import MultipleLosses
from diptych.losses.contrastive.clip import CLIPLoss
from diptych.losses.contrastive.siglip import SigLIPLoss
from diptych.losses.registry import register_loss


@register_loss("uncertainty")
class UncertaintyWeighted(MultipleLosses):
    """Losses weighted by learned uncertainty: sum_k [e^{-s_k} L_k + s_k / 2].

    s_k = log sigma_k^2, the logarithm of task k's noise, starts at 0 (weight 1) and converges to
    e^{-s_k} = 1 / (2 L_k): losses of any size end up with equal shares. The value can be negative.
    Terms: the weighted terms of each part, and `log_variance`, the sum of s_k / 2.

    A loss that can be negative is refused: its s would decrease without bound. A loss declares this
    with ``can_be_negative = True``, as those of this package do.

    Across ranks: the parts communicate; the gradient of s is averaged like that of any parameter.

    Source: Kendall et al. 2018, arXiv:1705.07115.

    Args:
        losses: The parts by name, or in a sequence, named as they are registered.
        inputs: For a part, the positions of the arguments that it takes, as for `WeightedSum`.

    Attributes:
        log_variances: s, [K], in the order of the parts. Give it no weight decay, which would
            pull every weight to 1.

    Raises:
        ValueError: If a part can be negative, or for the reasons of `WeightedSum`.
        TypeError: If a part is not an ``nn.Module``.
    """

    can_be_negative = True
    couples_samples = True

    def __init__(
        self,
        *,
        losses: Mapping[str, nn.Module] | Sequence[nn.Module],
        inputs: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(losses, inputs)
        for name, loss in self.losses.items():
            signed = [type(x).__name__ for x in loss.modules() if with_defaults(x).can_be_negative]
            if signed:
                raise ValueError(
                    f"losses must not be negative, got {name!r} with {signed[0]}. Its weight would"
                    " grow without bound; give it a fixed weight in a WeightedSum."
                )
        self.log_variances = nn.Parameter(torch.zeros(len(self.losses)))

    def part_weights(self) -> Mapping[str, Tensor]:
        """Return all parts with their weights e^{-s}."""
        return dict(zip(self.losses, (-self.log_variances).exp(), strict=True))

    def terms(self, *inputs: Tensor, **outputs: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of all parts, and `log_variance`.

        Args:
            *inputs: The outputs of the task.
            **outputs: The same by name.
        """
        return {**super().terms(*inputs, **outputs), "log_variance": self.log_variances.sum() / 2}

    def scalars(self) -> dict[str, Tensor]:
        """Return the parts' scalars and each part's weight e^{-s}, detached, for logs."""
        weights = {f"{name}/weight": w.detach() for name, w in self.part_weights().items()}
        return {**super().scalars(), **weights}

    @classmethod
    def example(cls) -> UncertaintyWeighted:
        """Return a small instance for the contract test."""
        return cls(losses=(CLIPLoss(), SigLIPLoss()))
