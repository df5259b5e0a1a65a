"""Blocks: contrastive objectives and their gradients, one block of rows at a time, in PyTorch.

A block of logits is computed, used and overwritten; what stays are vectors. The backward computes
each block again. Negatives and positives are summed apart, each as a maximum and a sum, because
at a scale of 100 the difference of two logsumexps would keep few of float32's digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Logits(NamedTuple):
    """The logits scale * anchors @ candidates.T + bias, [n, m], which are never held whole.

    Attributes:
        anchors: [n, D], float32 or float64; half precision for the Triton kernels.
        candidates: [m, D].
        scale: 0-dim.
        bias: 0-dim, or None for 0.
        normalize: Whether the features are still to be divided by their norms. The Triton kernels
            do that; here they come normalised.
    """

    anchors: Tensor
    candidates: Tensor
    scale: Tensor
    bias: Tensor | None = None
    normalize: bool = False

    def blocks(self, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield each block of rows, its logits [rows, m], and a spare tensor of that shape.

        Both stand in memory that the next block overwrites.
        """
        count = self.anchors.shape[0]
        memory = self.anchors.new_empty(2, min(rows, count), self.candidates.shape[0])
        for start in range(0, max(count, 1), rows):  # a rank may have no row
            block = slice(start, min(start + rows, count))
            values, spare = memory[:, : block.stop - start]
            torch.mm(self.anchors[block] * self.scale, self.candidates.T, out=values)
            yield block, values if self.bias is None else values.add_(self.bias), spare


class Entries(NamedTuple):
    """What each entry of the matrix of logits is: positive, negative, or neither.

    Attributes:
        partner: int64 [n], the column of each row's own pair.
        itself: int64 [n], a column that is neither, or None.
        row_groups: Integer ids [n], or None: every other column is a negative.
        column_groups: Integer ids [m], or None.
        group_matches: Whether a row's whole group are positives; else only its own pair is one,
            and the rest of the group is neither.
    """

    partner: Tensor
    itself: Tensor | None = None
    row_groups: Tensor | None = None
    column_groups: Tensor | None = None
    group_matches: bool = False

    def group(self, block: slice) -> Tensor | None:
        """Return which columns are of the group of a block's rows, bool [rows, m], or None."""
        if self.row_groups is None or self.column_groups is None:
            return None
        group = self.row_groups[block, None] == self.column_groups[None, :]
        return group if self.itself is None else group.scatter_(1, self.itself[block, None], False)

    def fill(self, values: Tensor, block: slice, *, positive: Tensor, neither: float) -> None:
        """Overwrite positives ([rows, 1] or [rows, m]) and what is neither in a block of values."""
        group = self.group(block)
        if group is not None and self.group_matches:
            torch.where(group, positive, values, out=values)
        else:
            if group is not None:
                values.masked_fill_(group, neither)
            values.scatter_(1, self.partner[block, None], positive)
        if self.itself is not None:
            values.scatter_(1, self.itself[block, None], neither)


class LogSum(NamedTuple):
    """A logsumexp as maximum + log(total).

    Attributes:
        maximum: The largest term, or the lowest finite number if there is none.
        total: The sum of exp(term - maximum).
    """

    maximum: Tensor
    total: Tensor

    @classmethod
    def over(cls, terms: Tensor, dim: int, out: Tensor) -> LogSum:
        """Return it over a dimension of a block; `out`, of the block's shape, is overwritten."""
        maximum = terms.amax(dim, keepdim=True).clamp_min_(torch.finfo(terms.dtype).min)
        total = torch.sub(terms, maximum, out=out).exp_().sum(dim)
        return cls(maximum.squeeze(dim), total)

    @classmethod
    def empty(cls, like: Tensor, count: int) -> LogSum:
        """Return it over no term, `count` times."""
        return cls(like.new_full((count,), torch.finfo(like.dtype).min), like.new_zeros(count))

    @classmethod
    def concatenated(cls, parts: list[LogSum]) -> LogSum:
        """Return those of several blocks as one."""
        return cls(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))

    def joined(self, other: LogSum) -> LogSum:
        """Return it over the terms of both."""
        maximum = torch.maximum(self.maximum, other.maximum)
        total = self.total * (self.maximum - maximum).exp()
        return LogSum(maximum, total + other.total * (other.maximum - maximum).exp())


class Sums(NamedTuple):
    """The logsumexps of one direction, of which its losses are made."""

    negatives: LogSum
    positives: LogSum


class Gradients(NamedTuple):
    """Gradients of anchors [n, D], candidates [m, D], and the 0-dim scale and bias."""

    anchors: Tensor
    candidates: Tensor
    scale: Tensor
    bias: Tensor

    @classmethod
    def zeros(cls, logits: Logits) -> Gradients:
        """Return zeros, for a sum over blocks."""
        scalar = torch.zeros_like(logits.scale)
        anchors, candidates = logits[:2]
        return cls(torch.zeros_like(anchors), torch.zeros_like(candidates), scalar, scalar.clone())

    def add(self, logits: Logits, block: slice, gradient: Tensor, weight: Tensor) -> None:
        """Add what `weight` times the gradient of a block of logits [rows, m] contributes."""
        anchors, candidates, scale, bias, _ = logits
        product = torch.mm(gradient, candidates, out=self.anchors[block])
        self.scale.add_((product * anchors[block]).sum() * weight)
        product.mul_(scale * weight)
        self.candidates.addmm_(gradient.T, anchors[block] * (scale * weight))
        if bias is not None:
            self.bias.add_(gradient.sum() * weight)


def losses(
    sums: Sums, valid: Tensor, *, decoupled: bool, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the sum of one direction's losses, and what its gradient needs.

    The loss of a row is lse(denominator) - (1 - smoothing) * lse(positives), computed from the
    gap between negatives and positives.

    Args:
        sums: Of n rows (or columns).
        valid: Bool [n]; the others add exactly 0.
        decoupled: Whether the positives are left out of the denominator.
        smoothing: In [0, 1).

    Returns:
        The sum, and [3, n]: normalizer, pull and positive. The gradient of a negative's logit l is
        exp(l - normalizer), of a positive's -pull * exp(l - positive).
    """
    negatives, positives = sums
    gap = (negatives.maximum - positives.maximum) + (negatives.total.log() - positives.total.log())
    positive = positives.maximum + positives.total.log()
    if decoupled:
        loss, pull = gap, torch.ones_like(gap)
    else:
        loss, pull = torch.logaddexp(gap, torch.zeros_like(gap)), gap.sigmoid()
    # An infinite normalizer turns a whole row into zeros.
    normalizer = (positive + loss).masked_fill(~valid, torch.inf)
    pull = (pull - smoothing).masked_fill(~valid, 0.0)
    total = (loss + smoothing * positive).masked_fill(~valid, 0.0).sum()
    return total, torch.stack([normalizer, pull, positive])


def contrast_sums(
    logits: Logits, entries: Entries, *, symmetric: bool, rows: int
) -> tuple[Sums, Sums | None]:
    """Return the sums of the rows and, if symmetric, of the columns.

    Args:
        logits: [n, m].
        entries: What each entry is; symmetric: with the own pairs on the diagonal.
        symmetric: Whether the columns are anchors too.
        rows: Rows of a block.
    """
    negatives, positives = [], []
    none = LogSum.empty(logits.anchors, logits.candidates.shape[0] if symmetric else 0)
    columns = Sums(none, none)
    for block, values, spare in logits.blocks(rows):
        own = values.gather(1, entries.partner[block, None])
        group = entries.group(block) if entries.group_matches else None
        matches = own if group is None else values.masked_fill(~group, -torch.inf)
        lowest = torch.full_like(own, -torch.inf)
        entries.fill(values, block, positive=lowest, neither=-torch.inf)
        negatives.append(LogSum.over(values, 1, spare))
        positives.append(LogSum.over(matches, 1, spare[:, : matches.shape[1]]))
        if symmetric:
            columns = Sums(
                columns.negatives.joined(LogSum.over(values, 0, spare)),
                none if group is None else columns.positives.joined(LogSum.over(matches, 0, spare)),
            )
    row_sums = Sums(LogSum.concatenated(negatives), LogSum.concatenated(positives))
    if not symmetric:
        return row_sums, None
    # Own pairs alone stand on the diagonal: rows and columns share them.
    return row_sums, columns if entries.group_matches else Sums(columns[0], row_sums[1])


def contrast_gradients(
    logits: Logits,
    entries: Entries,
    row_statistics: Tensor,
    column_statistics: Tensor | None,
    *,
    weight: Tensor,
    rows: int,
) -> Gradients:
    """Return `weight` times the gradients of the summed losses.

    Args:
        logits: [n, m].
        entries: What each entry is.
        row_statistics: [3, n], from `losses`.
        column_statistics: [3, m], or None if the columns are no anchors.
        weight: 0-dim.
        rows: Rows of a block.
    """
    gradients = Gradients.zeros(logits)
    for block, values, spare in logits.blocks(rows):
        normalizer, pull, positive = row_statistics[:, block, None]
        if entries.group_matches:
            pull = pull * (values - positive).exp_()
        gradient = torch.sub(values, normalizer, out=spare).exp_()
        if column_statistics is not None:
            normalizer, column_pull, positive = column_statistics
            if entries.group_matches:
                pull.addcmul_(column_pull, (values - positive).exp_())
            else:
                pull = pull + column_pull[entries.partner[block, None]]
            gradient += values.sub_(normalizer).exp_()
        entries.fill(gradient, block, positive=-pull, neither=0.0)
        gradients.add(logits, block, gradient, weight)
    return gradients


def sigmoid_sum(logits: Logits, entries: Entries, *, rows: int) -> Tensor:
    """Return the sum of softplus(-z * logit), z = +1 for a positive, else -1.

    Args:
        logits: [n, m].
        entries: Which are positives.
        rows: Rows of a block.
    """
    total = torch.zeros_like(logits.scale)
    for block, values, _ in logits.blocks(rows):
        _negate_positives(values, entries, block)
        total -= F.logsigmoid(values.neg_()).sum()  # exact where softplus turns linear
    return total


def sigmoid_gradients(logits: Logits, entries: Entries, *, weight: Tensor, rows: int) -> Gradients:
    """Return `weight` times the gradients of `sigmoid_sum`."""
    gradients = Gradients.zeros(logits)
    for block, values, _ in logits.blocks(rows):
        _negate_positives(values, entries, block)
        _negate_positives(values.sigmoid_(), entries, block)
        gradients.add(logits, block, values, weight)
    return gradients


def _negate_positives(values: Tensor, entries: Entries, block: slice) -> None:
    group = entries.group(block)
    if group is not None:
        torch.where(group, -values, values, out=values)
    else:
        partner = entries.partner[block, None]
        values.scatter_(1, partner, -values.gather(1, partner))
