"""Views of each sample as one set of anchors and candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.contrastive import Pairs
from diptych.losses.base.gather import GlobalBatch
from diptych.losses.base.positives import Positives


def two_views(pairs: Pairs) -> tuple[Tensor, Positives, GlobalBatch]:
    """Return this rank's 2b anchors, their matches among all ranks' anchors, and their batch.

    Anchors are [first; second] of a rank, and the candidates are the anchors of all ranks, rank
    after rank. An anchor's partner is its other view. The anchor itself is among the candidates and
    is neither positive nor negative. With groups, both views of every sample of the group match.

    Returns:
        Anchors [2b, D], the positives, and the batch that gathers anchors.
    """
    batch = pairs.batch.of_views(2)
    anchors = torch.cat((pairs.first, pairs.second))
    itself = batch.positions(anchors.device)
    row_groups = None if pairs.groups is None else pairs.groups.repeat(2)
    positives = Positives(
        batch.total,
        partner=itself.roll(pairs.batch.size),
        itself=itself,
        row_groups=row_groups,
        column_groups=None if row_groups is None else batch.gather(row_groups),
    )
    return anchors, positives, batch


def view_positives(
    groups: Tensor, batch: GlobalBatch, own: int, seen: int, *, among_candidates: bool = True
) -> Positives:
    """Return the matches of this rank's anchors among the candidates of all ranks.

    Args:
        groups: Integer ids [b], or multi-hot labels [b, C].
        batch: Sizes of all ranks.
        own: The number of views that are anchors; a rank's anchors come view after view.
        seen: The number of views that are candidates, rank after rank.
        among_candidates: Whether the anchors are the candidates.
    """
    candidates = batch.of_views(seen)
    return Positives(
        candidates.total,
        itself=candidates.positions(groups.device) if among_candidates else None,
        row_groups=torch.cat([groups] * own),
        column_groups=candidates.gather(torch.cat([groups] * seen)),
    )
