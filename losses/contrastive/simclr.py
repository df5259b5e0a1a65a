"""NTXentLoss: two views of each sample, contrasted with all other views in the batch."""

from __future__ import annotations

from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.objectives import Tile, check_tile, contrast
from diptych.losses.base.two_views import two_views
from diptych.losses.registry import register_loss


@register_loss("simclr")
class NTXentLoss(BaseContrastiveLoss):
    """Normalised temperature-scaled cross entropy between two views of each sample (SimCLR).

    The mean over 2B anchors of lse_{k != i}(z_i.z_k / tau) - z_i.z_pos / tau: the denominator
    leaves out the anchor itself, but not its other view. It is >= 0 and about ln(2B - 1) at chance;
    a single sample gives 0 without gradient. With `groups`, all views of the group are positives,
    and their log-probabilities are averaged (SupCon's outer form).

    Across ranks: both views are gathered, with gradient; a rank computes its 2b rows against all 2B
    columns. Exact for uneven local batches.

    Source: Chen et al. 2020, arXiv:2002.05709.

    Args:
        temperature: tau, > 0.
        learn_temperature: Whether ln(1 / tau) is a parameter, bounded to [0, ln 100].
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
        temperature: float = 0.5,
        learn_temperature: bool = False,
        normalize: bool = True,
        tile: Tile = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature, learn_temperature=learn_temperature, normalize=normalize
        )
        check_tile(tile)
        self.tile = tile

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}."""
        anchors, positives, batch = two_views(pairs)
        losses = contrast(
            anchors,
            anchors,
            self.temperature.scale(anchors),
            positives,
            batch=batch,
            tile=self.tile,
            normalize=pairs.normalize,
            dtype=pairs.dtype,
        )
        return {"contrastive": batch.mean(losses)}
