"""Positives: which pairs match. The one definition for losses, samplers and evaluation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def same_group(rows: Tensor, columns: Tensor) -> Tensor:
    """Return which ids are equal, bool [n, m], for integer ids [n] and [m]."""
    return rows[:, None] == columns[None, :]


class Positives(NamedTuple):
    """Which of m candidates match each of n anchors.

    Every anchor may have one `partner`, its own pair, which always matches; with group ids,
    every candidate of the anchor's group matches as well. `itself` is the column that holds the
    anchor (where anchors stand among the candidates): it is no positive and no negative.

    It holds vectors only; masks are made from them on demand, whole or for a block of rows, so that
    a tiled loss never holds n x m.

    Attributes:
        candidates: m.
        partner: int64 [n], the column of each anchor's own pair; None: groups alone decide.
        itself: int64 [n], the column that holds the anchor; None: no column does.
        row_groups: Integer ids [n], or None: only own pairs match.
        column_groups: Integer ids [m], or None.
    """

    candidates: int
    partner: Tensor | None = None
    itself: Tensor | None = None
    row_groups: Tensor | None = None
    column_groups: Tensor | None = None

    @property
    def grouped(self) -> bool:
        """Whether group ids decide, so that an anchor may have several positives."""
        return self.row_groups is not None

    def block(self, rows: slice) -> Positives:
        """Return the same for a slice of the anchors."""
        return self._replace(
            partner=None if self.partner is None else self.partner[rows],
            itself=None if self.itself is None else self.itself[rows],
            row_groups=None if self.row_groups is None else self.row_groups[rows],
        )

    def own(self) -> Tensor:
        """Return the mask of own pairs, bool [n, m]."""
        if self.partner is None:
            raise ValueError("these positives come from groups alone: there are no own pairs")
        return self._columns(self.partner) == self.partner[:, None]

    def matches(self) -> Tensor:
        """Return the mask of positives, bool [n, m]: own pair and group, not the anchor itself."""
        if self.row_groups is None or self.column_groups is None:
            return self.own()
        matches = same_group(self.row_groups, self.column_groups)
        if self.itself is not None:
            matches = matches & ~self.holds_itself()
        return matches

    def holds_itself(self) -> Tensor:
        """Return the mask of the anchors themselves among the candidates, bool [n, m]."""
        if self.itself is None:
            raise ValueError("the anchors are not among the candidates")
        return self._columns(self.itself) == self.itself[:, None]

    def others(self) -> Tensor:
        """Return the mask of all candidates but the anchor itself, bool [n, m]."""
        if self.itself is not None:
            return ~self.holds_itself()
        example = self.partner if self.partner is not None else self.row_groups
        assert example is not None, "Positives needs a partner or groups"
        return torch.ones(
            example.shape[0], self.candidates, dtype=torch.bool, device=example.device
        )

    def negatives(self) -> Tensor:
        """Return the mask of candidates that neither match nor are the anchor itself, [n, m]."""
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
