"""InfoNCELoss: queries against the positives of the batch and given hard negatives."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.gather import GlobalBatch, global_batch
from diptych.losses.base.loss import sum_of_terms
from diptych.losses.base.objectives import Tile, check_tile, contrast
from diptych.losses.base.positives import NO_GROUP, Positives
from diptych.losses.base.validation import check_choice, check_integers, check_views
from diptych.losses.registry import register_loss

DIRECTIONS = ("both", "first", "second")


@register_loss("info_nce")
class InfoNCELoss(BaseContrastiveLoss):
    """InfoNCE with given hard negatives: a query against all positives and all negatives (DPR).

    Called ``loss(first, second, negatives=None, groups=None, negative_groups=None)``. Direction
    ``first`` is the mean over queries q of -log exp(s q.p) / sum_c exp(s q.c), s = 1 / temperature:
    p is the query's own pair, and c runs over the second sides *and the given negatives* of all
    samples of all ranks. The negatives of one query are thus negatives of every query. Direction
    ``second`` contrasts each second side with all first sides; it has no given negatives. ``both``
    is the mean of the two: without negatives it is CLIP. The loss is >= 0.

    With `groups`, other pairs of a query's group are no negatives of it, nor are given negatives
    whose id in `negative_groups` is the query's group. Pass them if a negative of one query may be
    the positive of another.

    Across ranks: second sides, negatives and ids are gathered, with gradient; a rank computes its b
    rows against all B + M columns. Exact for uneven local batches and numbers of negatives; all
    ranks pass negatives, or none does.

    Source: Karpukhin et al. 2020, arXiv:2004.04906; Henderson et al. 2017, arXiv:1705.00652, for
    negatives from the batch alone.

    Args:
        directions: ``"both"``, ``"first"`` (retrieval of second sides) or ``"second"``.
        temperature: tau, > 0; 0.05 for cosine similarity. For dot products, as in DPR, pass
            ``temperature=1.0, normalize=False``.
        learn_temperature: Whether ln(1 / tau) is a parameter, bounded to [0, ln 100].
        normalize: Whether the loss normalises the features.
        tile: Rows of a tile; None: the whole matrix; ``"auto"``: tiles, in memory linear in the
            batch, if the matrix is large.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        directions: str = "both",
        temperature: float = 0.05,
        learn_temperature: bool = False,
        normalize: bool = True,
        tile: Tile = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature, learn_temperature=learn_temperature, normalize=normalize
        )
        check_choice("directions", directions, DIRECTIONS)
        check_tile(tile)
        self.directions = directions
        self.tile = tile

    def forward(  # type: ignore[override]  # negatives come before groups
        self,
        first: Tensor,
        second: Tensor,
        negatives: Tensor | None = None,
        groups: Tensor | None = None,
        negative_groups: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar that averages over ranks to that of the global batch.

        Args:
            first: [b, D], the queries.
            second: [b, D], their positives.
            negatives: [b, k, D], k of each query, or [m, D]. With micro-batches it must be
                [b, k, D].
            groups: Integers [b]; pairs with equal ids are not negatives of one another.
            negative_groups: Integers [b, k] or [m], the groups of the negatives, -100 for none;
                needs `groups`.

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If features are not floating point or ids not integers.
        """
        return sum_of_terms(self.terms(first, second, negatives, groups, negative_groups))

    def terms(  # type: ignore[override]  # negatives come before groups
        self,
        first: Tensor,
        second: Tensor,
        negatives: Tensor | None = None,
        groups: Tensor | None = None,
        negative_groups: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}. Arguments as for `forward`."""
        pairs = self.prepare(first, second, groups)
        ids = _check_negatives(pairs, negatives, negative_groups)
        if negatives is not None:
            negatives = self.normalize_features(negatives.flatten(0, -2).to(pairs.first.dtype))
        with torch.autocast(first.device.type, enabled=False):
            losses = torch.stack(list(self._directions(pairs, negatives, ids)))
            return {"contrastive": pairs.batch.mean(losses) / len(losses)}

    def _directions(
        self, pairs: Pairs, negatives: Tensor | None, ids: Tensor | None
    ) -> Iterator[Tensor]:
        """Yield the summed losses of this rank's anchors, for each direction."""
        if self.directions != "second":
            # Negatives follow the positives of their rank, so that one gather takes both.
            given = [] if negatives is None else [negatives]
            own = torch.cat([pairs.second, *given])
            columns = global_batch(len(own), negatives_given=len(given))
            groups = pairs.groups
            if groups is not None and ids is not None:
                groups = torch.cat((groups.long(), ids))
            yield self._contrast(pairs, pairs.first, columns, own, groups)
        if self.directions != "first":
            yield self._contrast(pairs, pairs.second, pairs.batch, pairs.first, pairs.groups)

    def _contrast(
        self,
        pairs: Pairs,
        anchors: Tensor,
        columns: GlobalBatch,
        own: Tensor,
        groups: Tensor | None,
    ) -> Tensor:
        """Return the summed losses of anchors [b, D] against all ranks' columns, own [n, D]."""
        positives = Positives(
            columns.total,
            partner=columns.positions(anchors.device)[: len(anchors)],
            row_groups=pairs.groups,
            column_groups=None if groups is None else columns.gather(groups),
        )
        scale = self.temperature.scale(anchors)
        candidates = columns.gather(own)
        return contrast(
            anchors, candidates, scale, positives, kind="mask", tile=self.tile, dtype=pairs.dtype
        )

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return both sides [batch, dim] and negatives [batch, 2, dim] for the contract test."""
        return tuple(
            torch.randn(*shape, dim, generator=generator)
            for shape in ((batch,), (batch,), (batch, 2))
        )


def _check_negatives(
    pairs: Pairs, negatives: Tensor | None, negative_groups: Tensor | None
) -> Tensor | None:
    """Validate the negatives and return their ids [m], or None if there is none."""
    if negatives is None:
        if negative_groups is not None:
            raise ValueError("negative_groups needs negatives, got None. Pass both or neither.")
        return None
    size, dim = pairs.first.shape
    check_views("negatives", negatives, middle="k")
    if negatives.shape[-1] != dim or (negatives.dim() == 3 and negatives.shape[0] != size):
        raise ValueError(
            f"negatives must be [{size}, k, {dim}] or [m, {dim}] for first [{size}, {dim}], got"
            f" shape {tuple(negatives.shape)}"
        )
    shape = negatives.shape[:-1]
    if negative_groups is None:
        return torch.full((shape.numel(),), NO_GROUP, device=negatives.device)
    if pairs.groups is None:
        raise ValueError("negative_groups needs groups, the ids of the queries, got None")
    check_integers("negative_groups", negative_groups)
    if negative_groups.shape != shape:
        raise ValueError(
            f"negative_groups must be {list(shape)}, an id for each negative, got shape"
            f" {tuple(negative_groups.shape)}"
        )
    return negative_groups.flatten().long()
