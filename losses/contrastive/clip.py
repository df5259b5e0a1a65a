"""CLIPLoss: symmetric InfoNCE over a batch of pairs."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.objectives import (
    KINDS,
    Tile,
    check_tile,
    contrast,
)
from diptych.losses.base.positives import Positives
from diptych.losses.base.validation import check_choice
from diptych.losses.registry import register_loss


def check_label_smoothing(value: float) -> None:
    """Raise ValueError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {value}")


def pair_positives(pairs: Pairs, columns: Tensor | None) -> Positives:
    """Return which of all ranks' second sides match this rank's first sides.

    Args:
        pairs: This rank's pairs.
        columns: The group ids of all ranks, int [B], or None.
    """
    return Positives(
        pairs.batch.total,
        partner=pairs.batch.positions(pairs.first.device),
        row_groups=pairs.groups,
        column_groups=columns,
    )


@register_loss("clip")
class CLIPLoss(BaseContrastiveLoss):
    """Symmetric InfoNCE: each side's own pair against all other samples of the batch (CLIP).

    With S = s * I @ T.T, s = 1 / temperature, I and T normalised:
    1/2 [CE(S, own pair) + CE(S.T, own pair)], each a mean over the B pairs. It is >= 0 and about
    ln B at chance; a single pair gives 0 and no gradient.

    With `groups`, pairs of one group match one another (several captions of one image): ``outside``
    averages the log-probabilities of the group (UniCL, arXiv:2204.03610), ``inside`` takes the log
    of their sum (MIL-NCE, arXiv:1912.06430), ``mask`` keeps the own pair as the positive and drops
    the rest of the group from the denominator.

    Across ranks: features and groups are gathered, with gradient; a rank computes its b rows and
    its b columns against all B, so memory is b x B. Exact for uneven local batches.

    Source: Radford et al. 2021, arXiv:2103.00020; van den Oord et al. 2018, arXiv:1807.03748.

    Args:
        temperature: tau, > 0; the paper starts at 0.07.
        learn_temperature: Whether ln(1 / tau) is a parameter. Give it no weight decay.
        max_logit_scale: Upper bound of a learned 1 / tau; the lower one is 1. `constrain` holds
            both after each optimizer step.
        label_smoothing: In [0, 1): the share of the target that is spread over all columns.
        positives: What several positives mean: ``"outside"``, ``"inside"`` or ``"mask"``.
        normalize: Whether features are normalised here.
        tile: Rows of a tile, in memory linear in the batch; None: the whole matrix; ``"auto"``.

    Raises:
        ValueError: If an argument is out of range.
    """

    symmetric: ClassVar[bool] = True
    normalizes_late: ClassVar[bool] = True

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
        check_label_smoothing(label_smoothing)
        check_choice("positives", positives, KINDS)
        check_tile(tile)
        self.label_smoothing = label_smoothing
        self.positives = positives
        self.tile = tile

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}."""
        batch = pairs.batch
        groups = None if pairs.groups is None else batch.gather(pairs.groups)
        positives = pair_positives(pairs, groups)
        scale = self.temperature.scale(pairs.first)

        def direction(own: Tensor, others: Tensor, *, symmetric: bool) -> Tensor:
            return contrast(
                own,
                others,
                scale,
                positives,
                kind=self.positives,
                label_smoothing=self.label_smoothing,
                symmetric=symmetric,
                tile=self.tile,
                normalize=pairs.normalize,
                dtype=pairs.dtype,
            )

        if batch.world_size == 1:
            losses = direction(pairs.first, pairs.second, symmetric=True)
        else:
            losses = direction(pairs.first, batch.gather(pairs.second), symmetric=False)
            losses = losses + direction(pairs.second, batch.gather(pairs.first), symmetric=False)
        return {"contrastive": 0.5 * batch.mean(losses)}
