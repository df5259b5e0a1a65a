"""DecoupledContrastiveLoss: InfoNCE with only negatives in the denominator."""

from __future__ import annotations

from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.objectives import Tile, check_tile, contrast
from diptych.losses.base.two_views import two_views
from diptych.losses.base.validation import check_positive
from diptych.losses.registry import register_loss


@register_loss("decoupled")
class DecoupledContrastiveLoss(BaseContrastiveLoss):
    """InfoNCE without the positive in the denominator, for small batches (DCL, DCLW).

    The mean over both views' 2B anchors of -w z_i.z_pos / tau + lse over the 2(B - 1) negatives,
    without the anchor itself and its positive. w = 1 (DCL), or with `sigma` (DCLW)
    w_i = 2 - B softmax_i(cos_i / sigma), detached: similar pairs get less weight. It can be
    negative. With `groups`, other samples of the group are not negatives; an anchor without
    negatives is left out of the mean.

    Across ranks: both views are gathered, with gradient; a rank computes its 2b rows against all 2B
    columns; the softmax of w runs over the global batch. Exact for uneven local batches.

    Source: Yeh et al. 2022, arXiv:2110.06848.

    Args:
        temperature: tau, > 0.
        sigma: Width of the weighting, > 0; the paper uses 0.5. None: no weighting.
        learn_temperature: Whether ln(1 / tau) is a parameter, bounded to [0, ln 100].
        normalize: Whether the loss normalises the features.
        tile: Rows of a tile; None: the whole matrix; ``"auto"``: tiles, in memory linear in the
            batch, if the matrix is large.

    Raises:
        ValueError: If an argument is out of range, or if the global batch is a single sample, which
            has no negative.
    """

    symmetric = True
    minimum_batch = 2
    can_be_negative = True

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        sigma: float | None = None,
        learn_temperature: bool = False,
        normalize: bool = True,
        tile: Tile = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature, learn_temperature=learn_temperature, normalize=normalize
        )
        if sigma is not None:
            check_positive("sigma", sigma)
        check_tile(tile)
        self.sigma = sigma
        self.tile = tile

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}."""
        anchors, positives, batch = two_views(pairs)
        scale = self.temperature.scale(anchors)
        losses = contrast(
            anchors,
            anchors,
            scale,
            positives,
            batch=batch,
            kind="mask",
            decoupled=True,
            tile=self.tile,
            dtype=pairs.dtype,
        )
        valid = positives.counts() < positives.candidates - 1
        if self.sigma is not None:
            rest = (1 - self._weights(pairs, self.sigma)) * (pairs.first * pairs.second).sum(1)
            losses = losses + (scale * rest.repeat(2)).masked_fill(~valid, 0.0).sum()
        if not positives.grouped:
            return {"contrastive": batch.mean(losses)}
        return {"contrastive": batch.mean(losses, valid)}

    def _weights(self, pairs: Pairs, sigma: float) -> Tensor:
        """Return w of this rank's pairs, [b]; over the global batch they sum to B."""
        batch = pairs.batch
        cosine = (pairs.first.detach() * pairs.second.detach()).sum(1) / sigma
        share = (cosine - batch.gather(cosine).logsumexp(0)).exp()
        return 2 - batch.total * share
