"""Two views of each sample as one set of anchors and candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.contrastive import Pairs
from diptych.losses.base.positives import Positives


def two_views(pairs: Pairs) -> tuple[Tensor, Tensor, Positives]:
    """Return this rank's 2b anchors, all ranks' 2B candidates, and their matches.

    Anchors are [first; second] of this rank, candidates [first; second] of all ranks. An anchor's
    partner is its other view. The anchor itself is among the candidates and is neither positive nor
    negative. With groups, both views of every sample of the group match.

    Returns:
        Anchors [2b, D], candidates [2B, D] with gradient to every rank, and the positives.
    """
    batch = pairs.batch
    anchors = torch.cat((pairs.first, pairs.second))
    here = batch.positions(anchors.device)
    there = here + batch.total
    row_groups = column_groups = None
    if pairs.groups is not None:
        row_groups = pairs.groups.repeat(2)
        column_groups = batch.gather(pairs.groups).repeat(2)
    positives = Positives(
        2 * batch.total,
        partner=torch.cat((there, here)),
        itself=torch.cat((here, there)),
        row_groups=row_groups,
        column_groups=column_groups,
    )
    if batch.world_size == 1:
        return anchors, anchors, positives
    candidates = torch.cat((batch.gather(pairs.first), batch.gather(pairs.second)))
    return anchors, candidates, positives
