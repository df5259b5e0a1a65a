"""Positives: the definition of matching pairs for losses, samplers and evaluation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diptych.losses.base.gather import GlobalBatch

NO_GROUP = -100
"""The id of a sample without a group or label, as torch's `ignore_index`."""
_UNLABELLED = -1  # data sets' other mark for it, which a trainer reports
_FIRST_OWN = torch.iinfo(torch.int64).min
_OWN_IDS = 2**40
"""Ids from `_FIRST_OWN` on, so many, are groups of one sample each: no data set numbers so."""


def with_own_groups(groups: Tensor, batch: GlobalBatch) -> Tensor:
    """Return group ids in which each sample without a group has a group of its own, int64 [b].

    Args:
        groups: Integers [b]; NO_GROUP, or -1, means no group.
        batch: Sizes of all ranks; the new ids differ over the global batch.
    """
    own = batch.positions(groups.device) + _FIRST_OWN
    groups = groups.long()  # 156 == -100 in uint8
    return torch.where((groups == NO_GROUP) | (groups == _UNLABELLED), own, groups)


def without_own_groups(groups: Tensor) -> Tensor:
    """Return ids with NO_GROUP again for the groups that `with_own_groups` has made."""
    return groups.long().masked_fill(groups < _FIRST_OWN + _OWN_IDS, NO_GROUP)


def same_group(rows: Tensor, columns: Tensor) -> Tensor:
    """Return which ids are equal, bool [n, m], for integer ids [n] and [m]."""
    return rows[:, None] == columns[None, :]


class Positives(NamedTuple):
    """The matches among m candidates of each of n anchors.

    Every anchor may have one `partner`, its own pair, which always matches. With group ids, every
    candidate of the anchor's group matches as well. If anchors are among the candidates, `itself`
    is the column of the anchor, which is neither positive nor negative.

    The fields are vectors. Masks are computed from them on demand, so that a tiled loss never holds
    n x m entries.

    Attributes:
        candidates: m.
        partner: int64 [n], the column of each anchor's own pair; None: only groups decide.
        itself: int64 [n], the column of the anchor itself; None: it is not a candidate.
        row_groups: Integer ids [n]; None: only own pairs match.
        column_groups: Integer ids [m], or None.
    """

    candidates: int
    partner: Tensor | None = None
    itself: Tensor | None = None
    row_groups: Tensor | None = None
    column_groups: Tensor | None = None

    @property
    def grouped(self) -> bool:
        """Whether there are group ids, so that an anchor may have several positives."""
        return self.row_groups is not None

    def block(self, rows: slice) -> Positives:
        """Return the positives of a slice of the anchors."""
        partner, itself, groups = (
            None if vector is None else vector[rows]
            for vector in (self.partner, self.itself, self.row_groups)
        )
        return self._replace(partner=partner, itself=itself, row_groups=groups)

    def own(self) -> Tensor:
        """Return the mask of own pairs, bool [n, m]."""
        if self.partner is None:
            raise ValueError("partner must be given for a mask of own pairs, got None")
        return self._columns(self.partner) == self.partner[:, None]

    def matches(self) -> Tensor:
        """Return the mask of positives, bool [n, m]: own pair and group without the anchor."""
        if self.row_groups is None or self.column_groups is None:
            return self.own()
        matches = same_group(self.row_groups, self.column_groups)
        if self.itself is not None:
            matches = matches & ~self.holds_itself()
        return matches

    def holds_itself(self) -> Tensor:
        """Return the mask of the anchors among the candidates, bool [n, m]."""
        if self.itself is None:
            raise ValueError("itself must be given for a mask of the anchors, got None")
        return self._columns(self.itself) == self.itself[:, None]

    def others(self) -> Tensor:
        """Return the mask of all candidates except the anchor itself, bool [n, m]."""
        if self.itself is not None:
            return ~self.holds_itself()
        example = self.partner if self.partner is not None else self.row_groups
        assert example is not None, "Positives needs a partner or groups"
        return torch.ones(
            example.shape[0], self.candidates, dtype=torch.bool, device=example.device
        )

    def negatives(self) -> Tensor:
        """Return the mask of candidates that do not match and are not the anchor, bool [n, m]."""
        return self.others() & ~self.matches()

    def counts(self) -> Tensor:
        """Return the number of positives of each anchor, int64 [n], in O((n + m) log m)."""
        if self.row_groups is None or self.column_groups is None:
            assert self.partner is not None, "Positives needs a partner or groups"
            return torch.ones_like(self.partner)
        ordered = self.column_groups.sort().values
        rows = self.row_groups.contiguous()
        counts = torch.searchsorted(ordered, rows, right=True) - torch.searchsorted(ordered, rows)
        return counts - 1 if self.itself is not None else counts

    def _columns(self, example: Tensor) -> Tensor:
        return torch.arange(self.candidates, device=example.device)[None, :]


def pair_positives(batch: GlobalBatch, groups: Tensor | None, device: torch.device) -> Positives:
    """Return the matches of this rank's first sides among all ranks' second sides.

    Args:
        batch: Sizes of all ranks.
        groups: The group ids of this rank, int [b], or None.
        device: The device of the features.
    """
    return Positives(
        batch.total,
        partner=batch.positions(device),
        row_groups=groups,
        column_groups=None if groups is None else batch.gather(groups),
    )
