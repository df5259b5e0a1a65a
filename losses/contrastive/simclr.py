"""NTXentLoss: views of each sample, contrasted with all other views in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.gather import GlobalBatch, global_batch
from diptych.losses.base.loss import sum_of_terms
from diptych.losses.base.objectives import Tile, check_tile, contrast
from diptych.losses.base.positives import Positives, with_own_groups
from diptych.losses.base.two_views import two_views, view_positives
from diptych.losses.base.validation import check_groups, check_two_views, check_views
from diptych.losses.registry import register_loss


@register_loss("simclr")
class NTXentLoss(BaseContrastiveLoss):
    """Normalised temperature-scaled cross entropy between two views of each sample (SimCLR).

    The mean over 2B anchors of lse_{k != i}(z_i.z_k / tau) - z_i.z_pos / tau: the denominator
    leaves out the anchor itself, but not its other view. It is >= 0 and about ln(2B - 1) at chance;
    a single sample gives 0 without gradient. With `groups`, all views of the group are positives,
    and their log-probabilities are averaged (SupCon's outer form).

    Called ``loss(first, second)``, or with more than two views in either argument, [B, V, D]; then
    an anchor's positives are all other views of its sample, averaged as those of a group.

    Across ranks: all views are gathered; a rank computes the rows of its own against all columns.
    Exact for uneven local batches.

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

    def forward(
        self, first: Tensor, second: Tensor | None = None, groups: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a scalar that averages over ranks to that of the global batch.

        Args:
            first: [b, D] or [b, V, D], floating point.
            second: More views, [b, D] or [b, V', D]; None: `first` has all of them.
            groups: Integers [b]; samples with equal ids match one another. -100: no group.

        Raises:
            ValueError: If shapes do not fit, or there is only one view.
            TypeError: If features are not floating point or groups not integers.
        """
        return sum_of_terms(self.terms(first, second, groups))

    def terms(
        self, first: Tensor, second: Tensor | None = None, groups: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}. Arguments as for `forward`."""
        if second is not None and second.dim() == first.dim() == 2:
            return super().terms(first, second, groups)
        views = _joined(first, second)
        size, count, dim = views.shape
        if count == 2:
            return super().terms(views[:, 0], views[:, 1], groups)
        check_groups("groups", groups, size)
        given = int(groups is not None)
        batch = global_batch(size, feature_dimension=dim, views=count, groups_given=given)
        ids = batch.positions(views.device) if groups is None else with_own_groups(groups, batch)
        with torch.autocast(views.device.type, enabled=False):
            anchors = self.normalize_features(torch.cat(views.unbind(1)))
            positives = view_positives(ids, batch, count, count)
            return self._mean(anchors, positives, batch.of_views(count), dtype=views.dtype)

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}."""
        return self._mean(*two_views(pairs), normalize=pairs.normalize, dtype=pairs.dtype)

    def _mean(
        self,
        anchors: Tensor,
        positives: Positives,
        batch: GlobalBatch,
        *,
        dtype: torch.dtype,
        normalize: bool = False,
    ) -> dict[str, Tensor]:
        losses = contrast(
            anchors,
            anchors,
            self.temperature.scale(anchors),
            positives,
            batch=batch,
            tile=self.tile,
            normalize=normalize,
            dtype=dtype,
        )
        return {"contrastive": batch.mean(losses)}


def _joined(first: Tensor, second: Tensor | None) -> Tensor:
    """Return the validated views of both arguments, [b, V, D]."""
    if second is None:
        check_views("first", first)
        sides = [first]
    else:
        check_two_views(("first", "second"), first, second)
        sides = [first, second]
    views = torch.cat([side if side.dim() == 3 else side[:, None] for side in sides], dim=1)
    if views.shape[1] == 1:
        raise ValueError(
            "first must have two views at least, got one. Pass [batch, views, features], or second."
        )
    return views
