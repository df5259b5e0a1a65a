"""Two views of each sample as one set of anchors and candidates."""

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
