"""SupervisedContrastiveLoss: samples with one label belong together, all others apart."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from diptych.losses.base.contrastive import normalize, total
from diptych.losses.base.gather import GlobalBatch, global_batch
from diptych.losses.base.objectives import Tile, check_tile, contrast, info_nce
from diptych.losses.base.positives import Positives
from diptych.losses.base.temperature import Temperature
from diptych.losses.base.validation import (
    check_choice,
    check_floating,
    check_groups,
    check_pair,
    working_dtype,
)
from diptych.losses.registry import register_loss


@register_loss("supervised_contrastive")
class SupervisedContrastiveLoss(nn.Module):
    """Contrast by label: every other sample, and view, of an anchor's label is a positive (SupCon).

    With l_ia = z_i.z_a / tau over the candidates a of anchor i, P(i) those with its label: the mean
    over anchors of -(1 / |P(i)|) sum_{p in P(i)} [l_ip - lse_{a != i} l_ia], the sum standing
    outside the log (L_out). It is >= 0. If no anchor has a positive it is 0, with a graph.

    Called ``loss(features, labels)`` with features [B, D] or [B, V, D], V views of each sample; or
    ``loss(first, second, labels)`` with two modalities [B, D], which count as two views. Labels are
    [B], or multi-hot [B, C]: then samples match whose labels overlap (no tiles there).

    Across ranks: features and labels are gathered, with gradient; a rank contrasts its b V anchors
    with all B V candidates and divides by the anchors of all ranks. Exact for uneven batches.

    Source: Khosla et al. 2020, arXiv:2004.11362. The authors' code multiplies by temperature /
    base_temperature as well, which is 1 at its defaults; the paper does not.

    Args:
        temperature: tau, > 0.
        learn_temperature: Whether ln(1 / tau) is a parameter, bounded to [0, ln 100].
        candidates: What an anchor is contrasted with: ``"all"`` views; ``"cross"``: views (or
            the modality) other than its own; ``"intra"``: its own view (modality) alone.
        without_positive: An anchor without a positive is left out of the mean (``"ignore"``) or
            counts in it as 0 (``"zero"``, as in the authors' code).
        overlap: In [0, 1): multi-hot labels match if more than this share of their union (Jaccard)
            is in both; 0: if they have one in common.
        normalize: Whether features are normalised here.
        tile: Rows of a tile, in memory linear in the batch; None: the whole matrix; ``"auto"``.

    Raises:
        ValueError: If an argument is out of range.
    """

    couples_samples: ClassVar[bool] = True

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
        super().__init__()
        check_choice("candidates", candidates, ("all", "cross", "intra"))
        check_choice("without_positive", without_positive, ("ignore", "zero"))
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must lie in [0, 1), got {overlap}")
        check_tile(tile)
        self.temperature = Temperature(
            temperature, learn=learn_temperature, min_scale=1.0, max_scale=100.0
        )
        self.candidates = candidates
        self.without_positive = without_positive
        self.overlap = overlap
        self.normalize = normalize
        self.tile = tile

    def forward(
        self, features: Tensor, second: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a scalar which averages over ranks to that of the global batch.

        Args:
            features: [b, D] or [b, V, D], floating point; [b, D] if `second` is a modality.
            second: The other modality, [b, D]; or, as the last argument, the labels.
            labels: Integers [b], or multi-hot 0 and 1 [b, C].

        Raises:
            ValueError: If shapes do not fit, or there is one view where two are needed.
            TypeError: If features are not floating point or labels not integers.
        """
        return total(self.terms(features, second, labels))

    def terms(
        self, features: Tensor, second: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return {"supervised": the loss}. Arguments as for `forward`."""
        views, labels = _views_and_labels(features, second, labels)
        size, count, dim = views.shape
        if self.candidates == "cross" and count == 1:
            raise ValueError(
                "candidates='cross' needs two views or modalities, got features with one view;"
                " give [batch, views, features], or a second modality"
            )
        batch = global_batch(size, feature_dimension=dim, views=count)
        with torch.autocast(views.device.type, enabled=False):
            anchors = views.to(working_dtype(views))
            anchors = normalize(anchors) if self.normalize else anchors
            everyone, everyones_labels = batch.gather(anchors), batch.gather(labels)
            losses, counted = [], []
            for own, seen in self._blocks(count):
                loss, has_positive = self._contrast(
                    torch.cat([anchors[:, view] for view in own]),
                    torch.cat([everyone[:, view] for view in seen]),
                    self._positives(labels, everyones_labels, batch, len(own), len(seen)),
                    views.dtype,
                )
                losses.append(loss)
                counted.append(has_positive)
            summed = torch.stack(losses)
            if self.without_positive == "zero":
                return {"supervised": batch.mean(summed) / count}
            return {"supervised": batch.mean(summed, torch.cat(counted))}

    def _blocks(self, count: int) -> list[tuple[list[int], list[int]]]:
        """Return (views of anchors, views of their candidates), for each group of anchors."""
        views = list(range(count))
        if self.candidates == "all":
            return [(views, views)]
        if self.candidates == "intra":
            return [([view], [view]) for view in views]
        return [([view], [other for other in views if other != view]) for view in views]

    def _positives(
        self, labels: Tensor, everyones: Tensor, batch: GlobalBatch, own: int, seen: int
    ) -> Positives:
        """Return who matches whom: view after view, this rank's samples against everybody's."""
        here = batch.positions(labels.device)
        itself = torch.cat([here + view * batch.total for view in range(own)])
        return Positives(
            batch.total * seen,
            itself=None if self.candidates == "cross" else itself,
            row_groups=torch.cat([labels] * own),
            column_groups=torch.cat([everyones] * seen),
        )

    def _contrast(
        self, anchors: Tensor, candidates: Tensor, positives: Positives, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the anchors' losses and bool [n], which anchors have a positive."""
        scale = self.temperature.scale(anchors)
        rows, columns = positives.row_groups, positives.column_groups
        assert rows is not None
        assert columns is not None
        if rows.dim() == 1:
            loss = contrast(anchors, candidates, scale, positives, tile=self.tile, dtype=dtype)
            return loss, positives.counts() > 0
        kept = positives.others()
        matches = kept & (jaccard(rows, columns) > self.overlap)
        return info_nce(scale * (anchors @ candidates.T), matches, kept).sum(), matches.any(1)

    def scalars(self) -> dict[str, Tensor]:
        """Return a learned temperature and its log scale, detached, for logs."""
        return self.temperature.scalars() if self.temperature.learned else {}

    @classmethod
    def example(cls) -> SupervisedContrastiveLoss:
        """Return a small instance for the contract test."""
        return cls()

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return features [batch, 2, dim] and labels [batch] for the contract test."""
        features = torch.randn(batch, 2, dim, generator=generator)
        return features, torch.randint(3, (batch,), generator=generator)


def jaccard(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the share of the union of two multi-hot rows that both have, float32 [n, m].

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
    check_floating("features", features)
    if features.dim() not in (2, 3) or 0 in features.shape[1:]:
        raise ValueError(
            "features must be [batch, features] or [batch, views, features], got shape"
            f" {tuple(features.shape)}"
        )
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor of integers, got {type(labels).__name__}")
    check_groups("labels", labels[:, 0] if labels.dim() == 2 else labels, features.shape[0])
    return features if features.dim() == 3 else features[:, None], labels
