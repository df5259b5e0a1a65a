"""HybridLoss: a blend of CLIP and VICReg whose weight is set during training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.losses.combine.composite import CompositeLoss
from diptych.losses.contrastive.clip import CLIPLoss
from diptych.losses.contrastive.vicreg import VICRegLoss
from diptych.losses.registry import register_loss


@register_loss("hybrid")
class HybridLoss(CompositeLoss):
    """Blend of contrast and VICReg: (1 - alpha) CLIP + alpha VICReg.

    Contrast aligns pairs quickly and needs negatives; VICReg decorrelates dimensions and needs
    none. Set the attribute `alpha` during training, by step or by the alignment of pairs. It is a
    plain number in [0, 1], which a checkpoint of the run holds, not the state dict. Both parts are
    computed at any alpha. The value is >= 0. Terms: `contrastive`, `vicreg/invariance`,
    `vicreg/variance`, `vicreg/covariance`, weighted. Scalars: `alpha`, and those of the parts.

    Across ranks: the parts gather, with gradient. Exact for uneven local batches.

    Source: Radford et al. 2021, arXiv:2103.00020; Bardes et al. 2022, arXiv:2105.04906.

    Args:
        alpha: The initial weight of VICReg, in [0, 1].
        contrastive: The loss at alpha = 0; None: ``CLIPLoss()``.
        vicreg: The loss at alpha = 1; None: ``VICRegLoss()``.

    Raises:
        ValueError: If alpha, here or when set, is out of range.
    """

    symmetric = True

    def __init__(
        self,
        *,
        alpha: float = 0.0,
        contrastive: nn.Module | None = None,
        vicreg: nn.Module | None = None,
    ) -> None:
        super().__init__(
            {"contrastive": contrastive or CLIPLoss(), "vicreg": vicreg or VICRegLoss()}
        )
        self.alpha = alpha

    @property
    def alpha(self) -> float:
        """The weight of VICReg, in [0, 1]."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        """Set the weight of VICReg, in [0, 1]."""
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        self._alpha = float(alpha)

    def terms(
        self, first: Tensor, second: Tensor, groups: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the weighted terms of both parts.

        Args:
            first: [b, D], floating point.
            second: [b, D], floating point.
            groups: Integers [b]; pairs with equal ids match one another in the contrastive part.

        Raises:
            ValueError: If shapes do not fit, or the global batch is a single pair.
            TypeError: If features are not floating point or groups not integers.
        """
        return {
            **self.part_terms("contrastive", 1 - self.alpha, first, second, groups),
            **self.part_terms("vicreg", self.alpha, first, second, groups),
        }

    def scalars(self) -> dict[str, Tensor]:
        """Return `alpha` and the parts' scalars, detached, for logs."""
        return {"alpha": torch.tensor(self.alpha), **super().scalars()}

    @classmethod
    def example(cls) -> HybridLoss:
        """Return a small instance for the contract test."""
        return cls(alpha=0.25)
