"""CrossModalLoss: contrast between modalities, within each modality, and by label."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.losses.base.gather import global_batch
from diptych.losses.base.validation import check_at_least, check_groups, check_two_views
from diptych.losses.combine.composite import CompositeLoss
from diptych.losses.contrastive.clip import CLIPLoss
from diptych.losses.registry import register_loss
from diptych.losses.supervised.supervised_contrastive import SupervisedContrastiveLoss


@register_loss("cross_modal")
class CrossModalLoss(CompositeLoss):
    """Weighted sum of InfoNCE across modalities, NT-Xent within each, and contrast by label.

    cross_modal_weight * CLIP(first, second) + intra_modal_weight * 1/2 [NTX(first) + NTX(second)]
    + supervised_weight * SupCon(first and second together). It is >= 0. Terms: `cross_modal`,
    `intra_modal`, `supervised`.

    Called ``loss(first, second, groups=None, labels=None)``. Each side is [B, D], or [B, V, D] with
    V views of each sample, the first of which is used between modalities. Within a modality, views
    of a sample and samples of its group match; samples without a match are left out, so that
    without views and groups the term is 0. The supervised term uses `labels`, or `groups` without
    labels, or each pair as its own class without either.

    Across ranks: the parts gather with gradient. Exact for uneven local batches.

    Source: a composition of Radford et al. 2021, arXiv:2103.00020; Chen et al. 2020,
    arXiv:2002.05709; Khosla et al. 2020, arXiv:2004.11362. With views it is close to SLIP, Mu et
    al. 2021, arXiv:2112.12750.

    Args:
        cross_modal_weight: >= 0.
        intra_modal_weight: >= 0.
        supervised_weight: >= 0.
        cross_modal: The loss called (first, second, groups); None: ``CLIPLoss()``.
        intra_modal: The loss called (features, groups); None: NT-Xent for any number of views,
            ``SupervisedContrastiveLoss(temperature=0.5)``.
        supervised: The loss called (features, labels); None: ``SupervisedContrastiveLoss()``.

    Raises:
        ValueError: If a weight is < 0.
    """

    symmetric = True

    def __init__(
        self,
        *,
        cross_modal_weight: float = 0.4,
        intra_modal_weight: float = 0.3,
        supervised_weight: float = 0.3,
        cross_modal: nn.Module | None = None,
        intra_modal: nn.Module | None = None,
        supervised: nn.Module | None = None,
    ) -> None:
        check_at_least("cross_modal_weight", cross_modal_weight, 0)
        check_at_least("intra_modal_weight", intra_modal_weight, 0)
        check_at_least("supervised_weight", supervised_weight, 0)
        super().__init__(
            {
                "cross_modal": cross_modal or CLIPLoss(),
                "intra_modal": intra_modal or SupervisedContrastiveLoss(temperature=0.5),
                "supervised": supervised or SupervisedContrastiveLoss(),
            }
        )
        self.cross_modal_weight = cross_modal_weight
        self.intra_modal_weight = intra_modal_weight
        self.supervised_weight = supervised_weight

    def terms(
        self,
        first: Tensor,
        second: Tensor,
        groups: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted terms `cross_modal`, `intra_modal` and `supervised`.

        Args:
            first: [b, D] or [b, V, D], floating point.
            second: [b, D] or [b, V, D], floating point.
            groups: Integers [b]; pairs with equal ids match one another.
            labels: Integers [b], the classes of the supervised term.

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If features are not floating point or ids not integers.
        """
        check_two_views(("first", "second"), first, second)
        sides = [side if side.dim() == 3 else side[:, None] for side in (first, second)]
        check_groups("groups", groups, first.shape[0])
        check_groups("labels", labels, first.shape[0])
        own = global_batch(first.shape[0]).positions(first.device)
        matches = own if groups is None else groups
        across = self.part_terms(
            "cross_modal", self.cross_modal_weight, sides[0][:, 0], sides[1][:, 0], groups
        )
        within = [
            self.part_terms("intra_modal", self.intra_modal_weight / 2, side, matches)
            for side in sides
        ]
        by_label = self.part_terms(
            "supervised",
            self.supervised_weight,
            torch.cat(sides, dim=1),
            matches if labels is None else labels,
        )
        added = {name: within[0][name] + within[1][name] for name in within[0]}
        return {**across, **added, **by_label}

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return both sides, [batch, 2, dim] and [batch, dim], for the contract test."""
        first = torch.randn(batch, 2, dim, generator=generator)
        return first, torch.randn(batch, dim, generator=generator)
