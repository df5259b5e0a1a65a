"""Blocks in PyTorch: contrastive losses and their gradients, one block of rows at a time.

A block of logits is computed, used and overwritten; only vectors are kept. The backward computes
each block again. Negatives and positives are summed separately, each as a maximum and a sum: at a
scale of 100, the difference of two logsumexps would keep few of float32's digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LossBlocks(NamedTuple):
    """Factors of the logits scale * anchors @ candidates.T + bias, [n, m], never held whole.

    Over ranks the candidates of this rank are a piece; the blocks are multiplied with `whole`, the
    candidates of all ranks.

    Attributes:
        anchors: [n, D], float32 or float64; half precision for the Triton kernels.
        candidates: [m, D], or this rank's piece of them; None: the anchors are the candidates.
        scale: 0-dim.
        bias: 0-dim, or None for 0.
        normalize: Whether to divide the features by their norms. Only the Triton kernels do so;
            the functions of this module get normalised features. `whole` is normalised.
    """

    anchors: Tensor
    candidates: Tensor | None
    scale: Tensor
    bias: Tensor | None = None
    normalize: bool = False

    @property
    def piece(self) -> Tensor:
        """This rank's candidates, [b, D]."""
        return self.anchors if self.candidates is None else self.candidates

    def by_rows(self, rows: int, whole: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield each block of rows, its logits [rows, m], and a spare tensor of that shape.

        The next block overwrites both tensors.
        """
        count = self.anchors.shape[0]
        memory = self.anchors.new_empty(2, min(rows, count), whole.shape[0])
        for start in range(0, max(count, 1), rows):  # one empty block for a rank without rows
            block = slice(start, min(start + rows, count))
            values, spare = memory[:, : block.stop - start]
            torch.mm(self.anchors[block] * self.scale, whole.T, out=values)
            yield block, values if self.bias is None else values.add_(self.bias), spare


class Entries(NamedTuple):
    """The kind of each entry of the matrix of logits: positive, negative, or neither.

    Attributes:
        partner: int64 [n], the column of each row's own pair.
        inverse: int64 [n], the column whose own pair is the row, if columns are anchors too; None:
            the partner.
        itself: int64 [n], a column that is neither, or None.
        row_groups: Integer ids [n], or None: every other column is a negative.
        column_groups: Integer ids [m], or None.
        group_matches: Whether a row's whole group is positive. Otherwise only its own pair is, and
            the rest of the group is neither.
        valid: Bool [n], the rows that have a loss; the others add exactly 0. None: all rows.
    """

    partner: Tensor
    inverse: Tensor | None = None
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

    def remove_positives(self, values: Tensor, block: slice) -> Tensor:
        """Return the positives of a block, [rows, 1] or, of groups, [rows, m]; leave negatives."""
        group = self.group(block) if self.group_matches else None
        if group is None:
            partner = self.partner[block, None]
            positives = values.gather(1, partner)
            values.scatter_(1, partner, -torch.inf)
        else:
            positives = values.masked_fill(~group, -torch.inf)
            values.masked_fill_(group, -torch.inf)
        self.remove_neutral(values, block)
        return positives

    def remove_neutral(self, values: Tensor, block: slice) -> None:
        """Set the entries that are neither positive nor negative to -inf, and own pairs or not."""
        group = None if self.group_matches else self.group(block)
        if group is not None:
            values.masked_fill_(group, -torch.inf)
        if self.itself is not None:
            values.scatter_(1, self.itself[block, None], -torch.inf)


class TileSettings(NamedTuple):
    """Numbers and switches of a tiled loss.

    Attributes:
        rows: Rows of a block.
        decoupled: Whether the positives are left out of the denominator.
        smoothing: The label smoothing, in [0, 1).
        symmetric: Whether this rank's candidates are anchors too, each the pair of the anchor in
            its place.
        gradient: Whether a gradient will be needed, which `sigmoid_gradients` computes at once.
    """

    rows: int
    decoupled: bool = False
    smoothing: float = 0.0
    symmetric: bool = False
    gradient: bool = True


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

    @classmethod
    def combined(cls, maxima: Tensor, totals: Tensor) -> LogSum:
        """Return the logsumexps over the terms of all parts, each [parts, n]."""
        maximum = maxima.amax(0)
        return cls(maximum, (totals * (maxima - maximum).exp()).sum(0))

    def joined(self, other: LogSum) -> LogSum:
        """Return the logsumexp over the terms of both."""
        maximum = torch.maximum(self.maximum, other.maximum)
        total = self.total * (self.maximum - maximum).exp()
        return LogSum(maximum, total + other.total * (other.maximum - maximum).exp())


class LineSums(NamedTuple):
    """The logsumexps of lines, from which their losses are computed.

    Lines are the rows, and after them columns if those are anchors too: those of all ranks over
    this rank's rows, or this rank's, each the pair of the row in its place, over all rows. If own
    pairs are the only positives, those of the rows are those of this rank's columns too.
    """

    negatives: LogSum
    positives: LogSum

    def packed(self) -> Tensor:
        """Return all sums as one vector."""
        return torch.cat([*self.negatives, *self.positives])

    @classmethod
    def unpacked(cls, packed: Tensor, lines: int) -> LineSums:
        """Return the sums of which `packed` is the vector, given the number of lines."""
        positives = len(packed) // 2 - lines
        parts = packed.split([lines, lines, positives, positives])
        return cls(LogSum(*parts[:2]), LogSum(*parts[2:]))

    def columns(self, entries: Entries) -> Tensor:
        """Return maxima and totals of the columns, [2, m], or [4, m] if groups are positive."""
        known = (*self.negatives, *self.positives)[: 4 if entries.group_matches else 2]
        return torch.stack([line[len(entries.partner) :] for line in known])

    def completed(self, entries: Entries, columns: Tensor) -> LineSums:
        """Return the sums of this rank's lines; `columns` as for `losses_of_sums`."""
        rows, every = len(entries.partner), list(self)
        for place, (maxima, totals) in enumerate(columns.unflatten(1, (-1, 2)).permute(1, 2, 0, 3)):
            own = LogSum(*(line[:rows] for line in every[place]))
            every[place] = LogSum.concatenated([own, LogSum.combined(maxima, totals)])
        return LineSums(*every)


class BlockGradients(NamedTuple):
    """Gradients of anchors [n, D], candidates [m, D], scale and bias (both 0-dim).

    If the anchors are the candidates, all of their gradient is in `anchors`. The gradient of a
    logit is then that of its row's and its column's loss, and that of the scale counts each twice.
    """

    anchors: Tensor
    candidates: Tensor | None
    scale: Tensor
    bias: Tensor

    @classmethod
    def zeros(cls, blocks: LossBlocks, whole: Tensor) -> BlockGradients:
        """Return zeros, to which each block is added."""
        scalar = torch.zeros_like(blocks.scale)
        candidates = None if blocks.candidates is None else scalar.new_zeros(whole.shape)
        return cls(scalar.new_zeros(blocks.anchors.shape), candidates, scalar, scalar.clone())

    def add(
        self, blocks: LossBlocks, whole: Tensor, block: slice, gradient: Tensor, weight: Tensor
    ) -> None:
        """Add the contribution of `weight` times the gradient of a block of logits [rows, m]."""
        anchors, scale = blocks.anchors[block], blocks.scale
        product = torch.mm(gradient, whole, out=self.anchors[block])
        self.scale.add_((product * anchors).sum() * weight)
        product.mul_(scale * weight)
        if self.candidates is not None:
            self.candidates.addmm_(gradient.T, anchors * (scale * weight))
        if blocks.bias is not None:
            self.bias.add_(gradient.sum() * weight)


def losses_of_sums(
    sums: LineSums, columns: Tensor, entries: Entries, settings: TileSettings
) -> tuple[Tensor, Tensor]:
    """Return the sum of all lines' losses, and the statistics that its gradient needs.

    The loss of a line is lse(denominator) - (1 - smoothing) * lse(positives), computed from the
    gap between negatives and positives.

    Args:
        sums: The logsumexps of the lines.
        columns: `LineSums.columns` of all ranks for the columns of this rank, [ranks, 2 or 4, b]:
            each rank has the terms of its rows. Empty if `sums` have all terms.
        entries: Which rows, and columns in their place, have a loss.
        settings: Whether positives are in the denominator, and the label smoothing.

    Returns:
        The sum, and [lines, 3]: normalizer, pull and positive. The gradient of a negative's logit l
        is exp(l - normalizer), of a positive's -pull * exp(l - positive).
    """
    smoothing = settings.smoothing
    negatives, positives = sums.completed(entries, columns) if len(columns) else sums
    if settings.symmetric and not entries.group_matches:
        positives = LogSum.concatenated([positives] * 2)
    gap = (negatives.maximum - positives.maximum) + (negatives.total.log() - positives.total.log())
    positive = positives.maximum + positives.total.log()
    if settings.decoupled:
        loss, pull = gap, torch.ones_like(gap)
    else:
        loss, pull = torch.logaddexp(gap, torch.zeros_like(gap)), gap.sigmoid()
    normalizer, pull, losses = positive + loss, pull - smoothing, loss + smoothing * positive
    if entries.valid is not None:
        invalid = ~entries.valid.repeat(1 + settings.symmetric)
        # An infinite normalizer turns the gradient of a whole line into zeros.
        normalizer = normalizer.masked_fill(invalid, torch.inf)
        pull, losses = pull.masked_fill(invalid, 0.0), losses.masked_fill(invalid, 0.0)
    return losses.sum(), torch.stack([normalizer, pull, positive], dim=1)


def contrast_sums(
    blocks: LossBlocks,
    entries: Entries,
    *,
    whole: Tensor,
    symmetric: bool,
    rows: int,
) -> LineSums:
    """Return the sums of the rows and, if symmetric, of all columns over them.

    Args:
        blocks: Factors of the logits [n, m].
        entries: The kind of each entry.
        whole: The candidates of all ranks, [m, D].
        symmetric: Whether the columns are anchors too.
        rows: Rows of a block.
    """
    negatives, positives = [], []
    columns = others = LogSum.empty(whole, whole.shape[0] if symmetric else 0)
    for block, values, spare in blocks.by_rows(rows, whole):
        matches = entries.remove_positives(values, block)
        negatives.append(LogSum.over(values, 1, spare))
        positives.append(LogSum.over(matches, 1, spare[:, : matches.shape[1]]))
        if symmetric and len(values):
            columns = columns.joined(LogSum.over(values, 0, spare))
            if entries.group_matches:
                others = others.joined(LogSum.over(matches, 0, spare))
    if symmetric:
        negatives.append(columns)
        if entries.group_matches:
            positives.append(others)
    return LineSums(LogSum.concatenated(negatives), LogSum.concatenated(positives))


def contrast_gradients(
    blocks: LossBlocks,
    entries: Entries,
    statistics: Tensor,
    weights: Tensor,
    *,
    columns: bool,
    whole: Tensor,
    rows: int,
) -> BlockGradients:
    """Return the gradients of the weighted losses by this rank's logits.

    Args:
        blocks: Factors of the logits [n, m].
        entries: The kind of each entry.
        statistics: From `losses_of_sums`: the first n are those of the rows, and the last m those
            of all ranks' columns if `columns`.
        weights: The weights of the same losses, or 0-dim, that of all.
        columns: Whether the columns are anchors.
        whole: The candidates of all ranks, [m, D].
        rows: Rows of a block.
    """
    gradients = BlockGradients.zeros(blocks, whole)
    # One weight multiplies the products, which saves a pass over the blocks.
    weighted = weights.dim() > 0
    common = weights.new_ones(()) if weighted else weights
    m = len(whole)
    normalizers, pulls, positives = statistics[-m:].T.contiguous()
    for block, values, spare in blocks.by_rows(rows, whole):
        group = entries.group(block) if entries.group_matches else None
        entries.remove_neutral(values, block)
        partner, own = entries.partner[block, None], statistics.T[:, block, None]
        gradient = _direction_gradient(values, own, partner, group, out=spare)
        if columns:
            inverse = partner if entries.inverse is None else entries.inverse[block, None]
            pull = pulls if group is not None else pulls[inverse]
            shared = normalizers, pull, positives
            others = _direction_gradient(values, shared, inverse, group, out=values)
            if weighted:
                gradient.mul_(weights[block, None]).addcmul_(others, weights[-m:])
            else:
                gradient += others
        gradients.add(blocks, whole, block, gradient, common)
    return gradients


def _direction_gradient(
    values: Tensor, statistics: Any, own: Tensor, group: Tensor | None, *, out: Tensor
) -> Tensor:
    """Return the gradient of a block of logits from the losses of its rows or of its columns.

    Args:
        values: The block, [rows, m].
        statistics: Normalizer, pull and positive, each [rows, 1] or [m]. Without a group, the pull
            is [rows, 1] in both directions, and the positive is not read.
        own: [rows, 1], the column of each row's own pair.
        group: Bool [rows, m], the positives; None: own pairs.
        out: A tensor of the same shape to write to.
    """
    normalizer, pull, positive = statistics
    pulls = None if group is None else (values - positive).exp_().mul_(pull)
    gradient = torch.sub(values, normalizer, out=out).exp_()
    if group is None or pulls is None:
        return gradient.scatter_(1, own, -pull)
    return torch.where(group, -pulls, gradient, out=gradient)


def sigmoid_gradients(
    blocks: LossBlocks, entries: Entries, *, whole: Tensor, settings: TileSettings
) -> tuple[Tensor, BlockGradients]:
    """Return the sum of softplus(-z * logit), z = +1 for a positive, else -1, and its gradients.

    The gradients are arbitrary if none will be needed.

    Args:
        blocks: Factors of the logits [n, m].
        entries: Which entries are positive.
        whole: The candidates of all ranks, [m, D].
        settings: Rows of a block, and whether a gradient will be needed.
    """
    gradients, total = BlockGradients.zeros(blocks, whole), torch.zeros_like(blocks.scale)
    for block, values, spare in blocks.by_rows(settings.rows, whole):
        _negate_positives(values, entries, block)
        # softplus turns linear for large values
        total -= F.logsigmoid(torch.neg(values, out=spare)).sum()
        if not settings.gradient:
            continue
        _negate_positives(values.sigmoid_(), entries, block)
        gradients.add(blocks, whole, block, values, torch.ones_like(total))
    return total, gradients


def finished(total: Tensor, features: Tensor, blocks: LossBlocks) -> Tensor:  # noqa: ARG001
    """Return the gradient of features from what the blocks summed up for them: here the same."""
    return total


def _negate_positives(values: Tensor, entries: Entries, block: slice) -> None:
    group = entries.group(block)
    if group is not None:
        torch.where(group, -values, values, out=values)
    else:
        partner = entries.partner[block, None]
        values.scatter_(1, partner, -values.gather(1, partner))
