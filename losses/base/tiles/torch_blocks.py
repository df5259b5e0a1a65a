"""Blocks in PyTorch: contrastive losses and their gradients, one block of rows at a time.

A block of logits is computed, used and overwritten; only vectors are kept. The backward computes
each block again. Negatives and positives are summed separately, each as a maximum and a sum: at a
scale of 100, the difference of two logsumexps would keep few of float32's digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LossBlocks(NamedTuple):
    """Factors of the logits scale * anchors @ candidates.T + bias, [n, m], never held whole.

    Attributes:
        anchors: [n, D], float32 or float64; half precision for the Triton kernels.
        candidates: [m, D].
        scale: 0-dim.
        bias: 0-dim, or None for 0.
        normalize: Whether to divide the features by their norms. Only the Triton kernels do so;
            for the functions of this module the features are normalised already.
    """

    anchors: Tensor
    candidates: Tensor
    scale: Tensor
    bias: Tensor | None = None
    normalize: bool = False

    def by_rows(self, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield each block of rows, its logits [rows, m], and a spare tensor of that shape.

        The next block overwrites both tensors.
        """
        count = self.anchors.shape[0]
        memory = self.anchors.new_empty(2, min(rows, count), self.candidates.shape[0])
        for start in range(0, max(count, 1), rows):  # one empty block for a rank without rows
            block = slice(start, min(start + rows, count))
            values, spare = memory[:, : block.stop - start]
            torch.mm(self.anchors[block] * self.scale, self.candidates.T, out=values)
            yield block, values if self.bias is None else values.add_(self.bias), spare


class Entries(NamedTuple):
    """The kind of each entry of the matrix of logits: positive, negative, or neither.

    Attributes:
        partner: int64 [n], the column of each row's own pair.
        itself: int64 [n], a column that is neither, or None.
        row_groups: Integer ids [n], or None: every other column is a negative.
        column_groups: Integer ids [m], or None.
        group_matches: Whether a row's whole group is positive. Otherwise only its own pair is, and
            the rest of the group is neither.
        valid: Bool [n], the rows that have a loss; the others add exactly 0. None: all rows.
    """

    partner: Tensor
    itself: Tensor | None = None
    row_groups: Tensor | None = None
    column_groups: Tensor | None = None
    group_matches: bool = False
    valid: Tensor | None = None

    def group(self, block: slice) -> Tensor | None:
        """Return which columns belong to the group of a block's rows, bool [rows, m], or None."""
        if self.row_groups is None or self.column_groups is None:
            return None
        group = self.row_groups[block, None] == self.column_groups[None, :]
        return group if self.itself is None else group.scatter_(1, self.itself[block, None], False)

    def fill(self, values: Tensor, block: slice, *, positive: Tensor, neither: float) -> None:
        """Overwrite the positives, by [rows, 1] or [rows, m], and the neutral entries."""
        group = self.group(block)
        if group is not None and self.group_matches:
            torch.where(group, positive, values, out=values)
        else:
            if group is not None:
                values.masked_fill_(group, neither)
            values.scatter_(1, self.partner[block, None], positive)
        if self.itself is not None:
            values.scatter_(1, self.itself[block, None], neither)


class TileSettings(NamedTuple):
    """Numbers and switches of a tiled loss.

    Attributes:
        rows: Rows of a block.
        decoupled: Whether the positives are left out of the denominator.
        smoothing: The label smoothing, in [0, 1).
        symmetric: Whether the columns are anchors too; own pairs are then on the diagonal.
    """

    rows: int
    decoupled: bool = False
    smoothing: float = 0.0
    symmetric: bool = False


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
        """Return the logsumexp over a dimension of a block; overwrite `out`, of its shape."""
        maximum = terms.amax(dim, keepdim=True).clamp_min_(torch.finfo(terms.dtype).min)
        total = torch.sub(terms, maximum, out=out).exp_().sum(dim)
        return cls(maximum.squeeze(dim), total)

    @classmethod
    def empty(cls, like: Tensor, count: int) -> LogSum:
        """Return `count` logsumexps over no terms."""
        return cls(like.new_full((count,), torch.finfo(like.dtype).min), like.new_zeros(count))

    @classmethod
    def concatenated(cls, parts: list[LogSum]) -> LogSum:
        """Return the logsumexps of several blocks as one."""
        return cls(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))

    def joined(self, other: LogSum) -> LogSum:
        """Return the logsumexp over the terms of both."""
        maximum = torch.maximum(self.maximum, other.maximum)
        total = self.total * (self.maximum - maximum).exp()
        return LogSum(maximum, total + other.total * (other.maximum - maximum).exp())


class DirectionSums(NamedTuple):
    """The logsumexps of all rows, or of all columns, from which their losses are computed."""

    negatives: LogSum
    positives: LogSum


class BlockGradients(NamedTuple):
    """Gradients of anchors [n, D], candidates [m, D], scale and bias (both 0-dim)."""

    anchors: Tensor
    candidates: Tensor
    scale: Tensor
    bias: Tensor

    @classmethod
    def zeros(cls, blocks: LossBlocks) -> BlockGradients:
        """Return zeros, to which each block is added."""
        scalar = torch.zeros_like(blocks.scale)
        anchors, candidates = blocks[:2]
        return cls(torch.zeros_like(anchors), torch.zeros_like(candidates), scalar, scalar.clone())

    def add(self, blocks: LossBlocks, block: slice, gradient: Tensor, weight: Tensor) -> None:
        """Add the contribution of `weight` times the gradient of a block of logits [rows, m]."""
        anchors, candidates, scale, bias, _ = blocks
        product = torch.mm(gradient, candidates, out=self.anchors[block])
        self.scale.add_((product * anchors[block]).sum() * weight)
        product.mul_(scale * weight)
        self.candidates.addmm_(gradient.T, anchors[block] * (scale * weight))
        if bias is not None:
            self.bias.add_(gradient.sum() * weight)


def losses_of_sums(
    sums: DirectionSums, entries: Entries, settings: TileSettings
) -> tuple[Tensor, Tensor]:
    """Return the sum of one direction's losses, and the statistics that its gradient needs.

    The loss of a row is lse(denominator) - (1 - smoothing) * lse(positives), computed from the
    gap between negatives and positives.

    Args:
        sums: The logsumexps of n rows (or columns).
        entries: Which of them have a loss.
        settings: Whether positives are in the denominator, and the label smoothing.

    Returns:
        The sum, and [3, n]: normalizer, pull and positive. The gradient of a negative's logit l is
        exp(l - normalizer), of a positive's -pull * exp(l - positive).
    """
    assert entries.valid is not None
    invalid, smoothing = ~entries.valid, settings.smoothing
    negatives, positives = sums
    gap = (negatives.maximum - positives.maximum) + (negatives.total.log() - positives.total.log())
    positive = positives.maximum + positives.total.log()
    if settings.decoupled:
        loss, pull = gap, torch.ones_like(gap)
    else:
        loss, pull = torch.logaddexp(gap, torch.zeros_like(gap)), gap.sigmoid()
    # An infinite normalizer turns the gradient of a whole row into zeros.
    normalizer = (positive + loss).masked_fill(invalid, torch.inf)
    pull = (pull - smoothing).masked_fill(invalid, 0.0)
    total = (loss + smoothing * positive).masked_fill(invalid, 0.0).sum()
    return total, torch.stack([normalizer, pull, positive])


def contrast_sums(
    blocks: LossBlocks, entries: Entries, *, symmetric: bool, rows: int
) -> tuple[DirectionSums, DirectionSums | None]:
    """Return the sums of the rows and, if symmetric, of the columns.

    Args:
        blocks: Factors of the logits [n, m].
        entries: The kind of each entry; if symmetric, own pairs are on the diagonal.
        symmetric: Whether the columns are anchors too.
        rows: Rows of a block.
    """
    negatives, positives = [], []
    none = LogSum.empty(blocks.anchors, blocks.candidates.shape[0] if symmetric else 0)
    columns = DirectionSums(none, none)
    for block, values, spare in blocks.by_rows(rows):
        own = values.gather(1, entries.partner[block, None])
        group = entries.group(block) if entries.group_matches else None
        matches = own if group is None else values.masked_fill(~group, -torch.inf)
        lowest = torch.full_like(own, -torch.inf)
        entries.fill(values, block, positive=lowest, neither=-torch.inf)
        negatives.append(LogSum.over(values, 1, spare))
        positives.append(LogSum.over(matches, 1, spare[:, : matches.shape[1]]))
        if symmetric:
            columns = DirectionSums(
                columns.negatives.joined(LogSum.over(values, 0, spare)),
                none if group is None else columns.positives.joined(LogSum.over(matches, 0, spare)),
            )
    row_sums = DirectionSums(LogSum.concatenated(negatives), LogSum.concatenated(positives))
    if not symmetric:
        return row_sums, None
    # Without groups, the only positives are on the diagonal, which rows and columns share.
    return row_sums, columns if entries.group_matches else DirectionSums(columns[0], row_sums[1])


def contrast_gradients(
    blocks: LossBlocks,
    entries: Entries,
    row_statistics: Tensor,
    column_statistics: Tensor | None,
    *,
    weight: Tensor,
    rows: int,
) -> BlockGradients:
    """Return `weight` times the gradients of the summed losses.

    Args:
        blocks: Factors of the logits [n, m].
        entries: The kind of each entry.
        row_statistics: [3, n], from `losses_of_sums`.
        column_statistics: [3, m], or None if the columns are not anchors.
        weight: 0-dim.
        rows: Rows of a block.
    """
    gradients = BlockGradients.zeros(blocks)
    for block, values, spare in blocks.by_rows(rows):
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
        gradients.add(blocks, block, gradient, weight)
    return gradients


def sigmoid_sum(blocks: LossBlocks, entries: Entries, *, rows: int) -> Tensor:
    """Return the sum of softplus(-z * logit), z = +1 for a positive, else -1.

    Args:
        blocks: Factors of the logits [n, m].
        entries: Which entries are positive.
        rows: Rows of a block.
    """
    total = torch.zeros_like(blocks.scale)
    for block, values, _ in blocks.by_rows(rows):
        _negate_positives(values, entries, block)
        total -= F.logsigmoid(values.neg_()).sum()  # softplus turns linear for large values
    return total


def sigmoid_gradients(
    blocks: LossBlocks, entries: Entries, *, weight: Tensor, rows: int
) -> BlockGradients:
    """Return `weight` times the gradients of `sigmoid_sum`."""
    gradients = BlockGradients.zeros(blocks)
    for block, values, _ in blocks.by_rows(rows):
        _negate_positives(values, entries, block)
        _negate_positives(values.sigmoid_(), entries, block)
        gradients.add(blocks, block, values, weight)
    return gradients


def _negate_positives(values: Tensor, entries: Entries, block: slice) -> None:
    group = entries.group(block)
    if group is not None:
        torch.where(group, -values, values, out=values)
    else:
        partner = entries.partner[block, None]
        values.scatter_(1, partner, -values.gather(1, partner))
