"""SigLIPLoss: a sigmoid cross entropy for every pair in the batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.objectives import Tile, check_tile, sigmoid_contrast
from diptych.losses.base.positives import pair_positives
from diptych.losses.base.validation import working_dtype
from diptych.losses.registry import register_loss


@register_loss("siglip")
class SigLIPLoss(BaseContrastiveLoss):
    """Sigmoid loss of all B x B combinations: does this text match this image (SigLIP).

    -(1/B) sum_ij log sigmoid(z_ij (s i.t + b)), z = +1 for matching pairs and -1 for the others,
    s = 1 / temperature. The divisor is B, not B^2. It is > 0. With `groups`, pairs of one group
    match one another, each as a separate positive.

    Across ranks: the second sides are gathered, with gradient; a rank computes its b rows against
    all B columns, in b x B memory, and divides by the global B. Exact for uneven local batches.

    Source: Zhai et al. 2023, arXiv:2303.15343.

    Args:
        temperature: tau, > 0; the paper starts at 0.1.
        bias: b; the paper's -10 starts from the prior that pairs do not match.
        learn_temperature: Whether ln(1 / tau) and the bias are parameters. Give them no
            weight decay.
        max_logit_scale: Upper bound of a learned 1 / tau, enforced by `constrain`; None, as in
            the paper: unbounded.
        normalize: Whether the loss normalises the features.
        tile: Rows of a tile; None: the whole matrix; ``"auto"``: tiles, in memory linear in the
            batch, if the matrix is large.

    Raises:
        ValueError: If an argument is out of range.
    """

    symmetric = True
    normalizes_late = True

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        bias: float = -10.0,
        learn_temperature: bool = True,
        max_logit_scale: float | None = None,
        normalize: bool = True,
        tile: Tile = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            learn_temperature=learn_temperature,
            min_logit_scale=None,
            max_logit_scale=max_logit_scale,
            normalize=normalize,
        )
        check_tile(tile)
        if not math.isfinite(bias):
            raise ValueError(f"bias must be finite, got {bias}")
        self.tile = tile
        self.bias: nn.Parameter | float = float(bias)
        self._rounding = 0.0
        if learn_temperature:
            stored = torch.tensor(float(bias), dtype=torch.float32)
            self.bias = nn.Parameter(stored)
            # The rounding error of float32, so that a float64 loss starts from exactly this bias.
            self._rounding = bias - float(torch.tensor(bias, dtype=torch.float32, device="cpu"))

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}."""
        batch = pairs.batch
        losses = sigmoid_contrast(
            pairs.first,
            pairs.second,
            self.temperature.scale(pairs.first),
            self._bias(pairs.first),
            pair_positives(batch, pairs.groups, pairs.first.device),
            batch=batch,
            tile=self.tile,
            normalize=pairs.normalize,
            dtype=pairs.dtype,
        )
        return {"contrastive": batch.mean(losses)}

    def share_bias(self, find: Callable[[], nn.Parameter]) -> None:
        """Use a model's own logit bias, exactly as the model stores it."""
        super().share_bias(find)
        self._rounding = 0.0

    def _bias(self, like: Tensor) -> Tensor:
        if isinstance(self.bias, Tensor):
            bias = self.bias.to(working_dtype(like)).reshape(())
            return bias + self._rounding if self._rounding else bias
        return torch.full((), self.bias, dtype=working_dtype(like), device=like.device)

    def scalars(self) -> dict[str, Tensor]:
        """Return the temperature, its log scale and the bias, if they are learned."""
        if not isinstance(self.bias, Tensor):
            return super().scalars()
        return {**super().scalars(), "bias": self.bias.detach().reshape(())}
