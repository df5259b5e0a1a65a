"""CLIPLoss: symmetric InfoNCE over a batch of pairs."""

from __future__ import annotations

from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.objectives import POSITIVE_KINDS, Tile, check_tile, contrast
from diptych.losses.base.positives import pair_positives
from diptych.losses.base.validation import check_choice, check_fraction
from diptych.losses.registry import register_loss


@register_loss("clip")
class CLIPLoss(BaseContrastiveLoss):
    """Symmetric InfoNCE: each side's own pair against all other samples of the batch (CLIP).

    1/2 [CE(S, own pair) + CE(S.T, own pair)] with S = s * I @ T.T, s = 1 / temperature, I and T
    normalised; each cross entropy is a mean over the B pairs. It is >= 0 and about ln B at chance;
    a single pair gives 0 without gradient.

    With `groups`, pairs of one group match one another (several captions of one image). ``outside``
    averages the log-probabilities of the group (UniCL, arXiv:2204.03610), ``inside`` takes the log
    of their sum (MIL-NCE, arXiv:1912.06430), ``mask`` keeps the own pair as the positive and drops
    the rest of the group from the denominator.

    Across ranks: the second sides are gathered, with gradient; a rank computes the b x B logits of
    its first sides, and sums over columns are completed over ranks. Exact for uneven local batches.

    Source: Radford et al. 2021, arXiv:2103.00020; van den Oord et al. 2018, arXiv:1807.03748.

    Args:
        temperature: tau, > 0; the paper starts at 0.07.
        learn_temperature: Whether ln(1 / tau) is a parameter. Give it no weight decay.
        max_logit_scale: Upper bound of a learned 1 / tau; the lower bound is 1. `constrain`
            enforces both after each optimizer step.
        label_smoothing: In [0, 1): the share of the target that is spread over all columns.
        positives: How several positives are combined: ``"outside"``, ``"inside"`` or ``"mask"``.
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
        temperature: float = 0.07,
        learn_temperature: bool = True,
        max_logit_scale: float = 100.0,
        label_smoothing: float = 0.0,
        positives: str = "outside",
        normalize: bool = True,
        tile: Tile = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
            normalize=normalize,
        )
        check_fraction("label_smoothing", label_smoothing)
        check_choice("positives", positives, POSITIVE_KINDS)
        check_tile(tile)
        self.label_smoothing = label_smoothing
        self.positives = positives
        self.tile = tile

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}."""
        losses = contrast(
            pairs.first,
            pairs.second,
            self.temperature.scale(pairs.first),
            pair_positives(pairs.batch, pairs.groups, pairs.first.device),
            kind=self.positives,
            label_smoothing=self.label_smoothing,
            symmetric=True,
            batch=pairs.batch,
            tile=self.tile,
            normalize=pairs.normalize,
            dtype=pairs.dtype,
        )
        return {"contrastive": pairs.batch.of_views(2).mean(losses)}
