"""SupervisedContrastiveLoss: contrast with all samples of the same label as positives."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss
from diptych.losses.base.gather import GlobalBatch, global_batch
from diptych.losses.base.loss import sum_of_terms
from diptych.losses.base.normalization import normalize
from diptych.losses.base.objectives import Tile, check_tile, contrast, masked_info_nce
from diptych.losses.base.positives import Positives, with_own_groups
from diptych.losses.base.two_views import view_positives
from diptych.losses.base.validation import (
    check_choice,
    check_fraction,
    check_groups,
    check_integers,
    check_pair,
    check_views,
    working_dtype,
)
from diptych.losses.registry import register_loss


@register_loss("supervised_contrastive")
class SupervisedContrastiveLoss(BaseContrastiveLoss):
    """Contrast by label: every other sample, and view, of an anchor's label is a positive (SupCon).

    With l_ia = z_i.z_a / tau over the candidates a of anchor i, P(i) those with its label: the mean
    over anchors of -(1 / |P(i)|) sum_{p in P(i)} [l_ip - lse_{a != i} l_ia], with the sum
    outside the log (L_out). It is >= 0. If no anchor has a positive it is 0, with a graph.

    Called ``loss(features, labels)`` with features [B, D] or [B, V, D], V views of each sample; or
    ``loss(first, second, labels)`` with two modalities [B, D], which count as two views. Labels are
    [B], or multi-hot [B, C]: then samples match if their labels overlap (always without tiles);
    entries below 0, as data sets have for an unknown label, count as 0. Views of a sample whose
    label is -100 (no label) match only one another.

    Across ranks: features and labels are gathered, with gradient; a rank contrasts its b V anchors
    with all B V candidates and divides by the anchors of all ranks. Exact for uneven batches.

    Source: Khosla et al. 2020, arXiv:2004.11362. The authors' code multiplies by temperature /
    base_temperature, which is 1 at its defaults; the paper does not.

    Args:
        temperature: tau, > 0.
        learn_temperature: Whether ln(1 / tau) is a parameter, bounded to [0, ln 100].
        candidates: The candidates of an anchor: ``"all"`` views; ``"cross"``: views (or the
            modality) other than its own; ``"intra"``: only its own view (modality).
        without_positive: Whether an anchor without a positive is left out of the mean
            (``"ignore"``) or counts as 0 (``"zero"``, as in the authors' code).
        overlap: In [0, 1): multi-hot labels match if their intersection is more than this share of
            their union (Jaccard); 0: if they have one label in common.
        normalize: Whether the loss normalises the features.
        tile: Rows of a tile; None: the whole matrix; ``"auto"``: tiles, in memory linear in the
            batch, if the matrix is large.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        candidates: str = "all",
        without_positive: str = "ignore",
        overlap: float = 0.0,
        normalize: bool = True,
        tile: Tile = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature, learn_temperature=learn_temperature, normalize=normalize
        )
        check_choice("candidates", candidates, ("all", "cross", "intra"))
        check_choice("without_positive", without_positive, ("ignore", "zero"))
        check_fraction("overlap", overlap)
        check_tile(tile)
        self.candidates = candidates
        self.without_positive = without_positive
        self.overlap = overlap
        self.tile = tile

    def forward(
        self, features: Tensor, second: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a scalar that averages over ranks to that of the global batch.

        Args:
            features: [b, D] or [b, V, D], floating point; [b, D] if `second` is a modality.
            second: The other modality, [b, D]; or, as the last argument, the labels.
            labels: Integers [b], or multi-hot 0 and 1 [b, C].

        Raises:
            ValueError: If shapes do not fit, or there is one view where two are needed.
            TypeError: If features are not floating point or labels not integers.
        """
        return sum_of_terms(self.terms(features, second, labels))

    def terms(
        self, features: Tensor, second: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {"supervised": the loss}. Arguments as for `forward`."""
        views, labels = _views_and_labels(features, second, labels)
        size, count, dim = views.shape
        if self.candidates == "cross" and count == 1:
            raise ValueError(
                "candidates='cross' needs two views or modalities, got features with one view."
                " Pass [batch, views, features], or a second modality."
            )
        batch = global_batch(size, feature_dimension=dim, views=count)
        labels = with_own_groups(labels, batch) if labels.dim() == 1 else labels
        with torch.autocast(views.device.type, enabled=False):
            anchors = views.to(working_dtype(views))
            anchors = normalize(anchors) if self.normalize else anchors
            losses, counted = [], []
            for own, seen in self._blocks(count):
                rows = torch.cat([anchors[:, view] for view in own])
                same = own == seen
                loss, has_positive = self._contrast(
                    rows,
                    rows if same else torch.cat([anchors[:, view] for view in seen]),
                    view_positives(labels, batch, len(own), len(seen), among_candidates=same),
                    batch.of_views(len(seen)),
                    views.dtype,
                )
                losses.append(loss)
                counted.append(has_positive)
            summed = torch.stack(losses)
            if self.without_positive == "zero":
                return {"supervised": batch.mean(summed) / count}
            return {"supervised": batch.mean(summed, torch.cat(counted))}

    def _blocks(self, count: int) -> list[tuple[list[int], list[int]]]:
        """Return (views of anchors, views of their candidates) for each block of anchors."""
        views = list(range(count))
        if self.candidates == "all":
            return [(views, views)]
        if self.candidates == "intra":
            return [([view], [view]) for view in views]
        return [([view], [other for other in views if other != view]) for view in views]

    def _contrast(
        self,
        anchors: Tensor,
        candidates: Tensor,
        positives: Positives,
        batch: GlobalBatch,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the anchors' losses and bool [n], which anchors have a positive."""
        scale = self.temperature.scale(anchors)
        rows, columns = positives.row_groups, positives.column_groups
        assert rows is not None
        assert columns is not None
        if rows.dim() == 1:
            loss = contrast(
                anchors, candidates, scale, positives, batch=batch, tile=self.tile, dtype=dtype
            )
            return loss, positives.counts() > 0
        kept = positives.others()
        matches = kept & (jaccard(rows, columns) > self.overlap)
        logits = scale * (anchors @ batch.gather(candidates).T)
        return masked_info_nce(logits, matches, kept).sum(), matches.any(1)

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return features [batch, 2, dim] and labels [batch] for the contract test."""
        features = torch.randn(batch, 2, dim, generator=generator)
        return features, torch.randint(3, (batch,), generator=generator)


def jaccard(rows: Tensor, columns: Tensor) -> Tensor:
    """Return intersection over union of every two multi-hot rows, float32 [n, m].

    Args:
        rows: 0 or 1, [n, C].
        columns: 0 or 1, [m, C].
    """
    rows, columns = rows.float(), columns.float()
    both = rows @ columns.T
    return both / (rows.sum(1)[:, None] + columns.sum(1) - both).clamp_min(1)


def _views_and_labels(
    features: Tensor, second: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return validated features [b, V, D] and labels [b]."""
    if labels is None:
        second, labels = None, second
    if second is not None:
        check_pair(("features", "second"), features, second)
        features = torch.stack((features, second), dim=1)
    check_views("features", features)
    check_integers("labels", labels)
    assert labels is not None
    if labels.dim() == 2 and labels.shape[1] == 1:
        raise ValueError(
            f"labels must be [batch], or multi-hot [batch, classes], got {list(labels.shape)}."
            " Pass labels.squeeze(1)."
        )
    check_groups("labels", labels[:, 0] if labels.dim() == 2 else labels, features.shape[0])
    if labels.dim() == 2:
        labels = labels.clamp_min(0)  # data sets mark unknown entries with -1
    return features if features.dim() == 3 else features[:, None], labels
