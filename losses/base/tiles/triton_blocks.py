"""Blocks in Triton: the functions of `torch_blocks` for half precision on CUDA.

The tensor cores multiply bfloat16 and float16 features as such; all sums are float32. The forward
writes no logits: each tile is reduced to sums of its rows and columns. The backward writes the
gradient of a chunk of logits in bfloat16, and two matrix products turn it into the features'
gradients. This rounds each entry to 2**-9 of itself, as the features are rounded, and the products
average the errors out: the features' gradients are within 2e-3 (relative, in norm) of float64's,
which is the cost of rounding the features to bfloat16.

Exponentials are relative to one bound on all logits, so that each serves a row and a column. If the
bound is so loose that a sum leaves float32's range, sums with a maximum for each row replace them.
The kernels read that decision on the device; the host never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diptych.losses.base.gather import GlobalBatch, max_over_ranks
from diptych.losses.base.tiles import triton_kernels as kernels
from diptych.losses.base.tiles.torch_blocks import (
    BlockGradients,
    DirectionSums,
    Entries,
    LogSum,
    LossBlocks,
    TileSettings,
    own_columns,
)

_SIDE = 128
"""Rows and columns of a tile; chunks begin at multiples of it."""

_Tile = dict[str, int]
"""The shape of a tile, and the warps and stages with which it is computed."""

_TILE: _Tile = {"ROWS": _SIDE, "COLUMNS": _SIDE, "STEP": 64, "num_warps": 4, "num_stages": 3}
_BAND = 16
_LOG2_E = 1.4426950408889634

# 2**20 terms of up to 2**_HEADROOM stay in float32's range. A sum below 2**-_DEPTH may have lost
# significant terms.
_HEADROOM = 100.0
_DEPTH = 80.0

_CHUNK_ROWS = 8192
_FORWARD_COLUMNS = 65536
_FORWARD_LOGITS = 2**30


class _Chunk(NamedTuple):
    """A part of the logits that one launch computes."""

    row: int
    column: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.column, self.column + self.width)

    def tiles(self) -> tuple[int, int]:
        """Return the number of tiles down and across."""
        return _blocks(self.height), _blocks(self.width)


_Sides = tuple[TensorDescriptor, TensorDescriptor]
"""A chunk's anchors and candidates, as the kernels load them."""

_Launch = Callable[[_Chunk, _Sides, TensorDescriptor, Tensor], None]
"""Launches a kernel that writes the gradient of a chunk of logits [height, width] to the third
argument and adds each tile's gradients of scale and bias to the fourth, [2, tiles]."""


class _KernelProblem:
    """The arguments of the kernels, for features at unit norm.

    Attributes:
        reference: 0-dim, the exponent of 2 to which all sums are relative: a bound on the logits,
            less a headroom. The argument `bound` is one on the products of features; None: 1.
    """

    def __init__(
        self, blocks: LossBlocks, entries: Entries, whole: Tensor, bound: Tensor | None = None
    ) -> None:
        anchors, _, scale, bias, _ = self.blocks = blocks
        self.whole = whole
        self.n, self.m = anchors.shape[0], whole.shape[0]
        self.scalars = [scale] if bias is None else [scale, bias]
        partner = entries.partner
        inverse = partner if entries.inverse is None else entries.inverse
        itself = partner if entries.itself is None else entries.itself
        group, groups = kernels.NEGATIVE, [partner, partner]  # placeholders: not read
        if entries.row_groups is not None and entries.column_groups is not None:
            group = kernels.POSITIVE if entries.group_matches else kernels.NEITHER
            groups = [entries.row_groups.contiguous(), entries.column_groups.contiguous()]
        indices = partner.new_empty(3, self.n, dtype=torch.int32)
        bounds = partner.new_empty(max(_blocks(self.n), 1), 6, dtype=torch.int32)
        is_candidate = entries.itself is not None
        self.reference = torch.empty_like(scale)
        _launch(
            kernels.describe_rows,
            bounds,
            *(partner, inverse, itself, indices, bounds),
            *(scale, scale if bound is None else bound, self.reference, self.n),
            ITSELF=is_candidate,
            BOUNDED=bound is not None,
            HEADROOM=_HEADROOM,
        )
        self.inputs = [*indices, bounds, *groups]
        self.settings = {
            "WIDTH": anchors.shape[1],
            "ITSELF": is_candidate,
            "GROUP": group,
        }

    def tiles(
        self,
        kernel: Any,
        tile: _Tile,
        chunk: _Chunk,
        sides: _Sides,
        *arguments: Any,
        **settings: Any,
    ) -> None:
        """Run a kernel on every tile of a chunk."""
        down, across = chunk.tiles()
        self._run(kernel, down * across, chunk, sides, arguments, BAND=_BAND, **tile, **settings)

    def lines(self, kernel: Any, axis: int, *arguments: Any, **settings: Any) -> None:
        """Run a kernel on every row of tiles (axis 1) or every column of tiles (axis 0)."""
        chunk = _Chunk(0, 0, self.n, self.m)
        sides = _sides(self.blocks.anchors, self.whole)
        count = chunk.tiles()[1 - axis]
        self._run(kernel, count, chunk, sides, arguments, AXIS=axis, **_TILE, **settings)

    def _run(
        self,
        kernel: Any,
        programs: int,
        chunk: _Chunk,
        sides: _Sides,
        arguments: tuple[Any, ...],
        **settings: Any,
    ) -> None:
        shape = (*chunk, self.n, self.m)
        kernel[(programs,)](
            *sides, *self.inputs, *shape, *self.scalars, *arguments, **settings, **self.settings
        )

    def chunks(self, height: int, width: int, *, upper: bool = False) -> Iterator[_Chunk]:
        """Yield chunks of the logits, along the columns first.

        Args:
            height: The most rows.
            width: The most columns.
            upper: Whether to leave out chunks below the diagonal.
        """
        for row in range(0, self.n, height):
            for column in range(row if upper else 0, self.m, width):
                lengths = min(height, self.n - row), min(width, self.m - column)
                yield _Chunk(row, column, *lengths)


def contrast_sums(
    blocks: LossBlocks,
    entries: Entries,
    *,
    whole: Tensor,
    batch: GlobalBatch,
    symmetric: bool,
    rows: int,  # noqa: ARG001 - memory does not depend on it
) -> tuple[DirectionSums, DirectionSums | None]:
    """Return the sums of the rows and, if symmetric, of this rank's columns, as in `torch_blocks`.

    If the candidates of one rank are its anchors, the matrix is symmetric: half of it is computed.
    """
    bound = _bound(blocks, whole, over_ranks=symmetric and batch.world_size > 1)
    upper = blocks.candidates is None and batch.world_size == 1
    blocks, whole = _at_norm(blocks, whole, batch)
    problem = _KernelProblem(blocks, entries, whole, bound)
    own, row_total, column_total = _bounded_sums(problem, both=symmetric or upper, upper=upper)
    row_sums = _line_sums(problem, 1, row_total, own, entries)
    if not symmetric:
        return row_sums, None
    column_sums = _line_sums(problem, 0, column_total, own, entries)
    return row_sums, own_columns(column_sums, row_sums, entries, batch)


def _bounded_sums(
    problem: _KernelProblem, *, both: bool, upper: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of own pairs [n], and the sums of the negatives of rows and of columns.

    Sums are relative to the reference. With `upper` only one half of a symmetric matrix is
    computed, and the sums of rows and columns are one tensor; without `both` columns have none.
    """
    anchors, whole = problem.blocks.anchors, problem.whole
    own, row_total = problem.reference.new_zeros(2, problem.n)
    column_total = row_total if upper else own.new_zeros(problem.m * both)
    new = own.new_zeros if upper else own.new_empty  # tiles below the diagonal write nothing
    height = _rounded_up(max(_CHUNK_ROWS, _FORWARD_LOGITS // problem.m))
    for chunk in problem.chunks(height, _FORWARD_COLUMNS, upper=upper):
        down, across = chunk.tiles()
        sums = new(across, chunk.height), new(down, chunk.width * both)
        sides = _sides(anchors[chunk.rows], whole[chunk.columns])
        arguments = (problem.reference, own, *sums)
        problem.tiles(kernels.bounded_sums, _TILE, chunk, sides, *arguments, BOTH=both, UPPER=upper)
        _add_sums(row_total[chunk.rows], sums[0], first=chunk.column == 0 and not upper)
        if both:
            _add_sums(column_total[chunk.columns], sums[1], first=chunk.row == 0 and not upper)
    return own, row_total, column_total


def _line_sums(
    problem: _KernelProblem, axis: int, totals: Tensor, own: Tensor, entries: Entries
) -> DirectionSums:
    """Return the sums of rows (axis 1) or of columns (axis 0).

    Args:
        problem: The arguments of the kernels.
        axis: The axis that is summed.
        totals: The sums of negatives relative to the reference. Where terms may be lost, they are
            computed again.
        own: [n], the logits of own pairs.
        entries: Whether whole groups are positives.
    """
    if not problem.n or not problem.m:  # a rank without samples
        return DirectionSums(LogSum.empty(own, len(totals)), LogSum.empty(own, len(totals)))
    settings = {"LEAST": 2.0**-_DEPTH}
    negatives = LogSum(torch.empty_like(totals), totals)
    arguments = (problem.reference, *negatives)
    problem.lines(kernels.online_sums, axis, *arguments, POSITIVES=False, **settings)
    if not entries.group_matches:
        return DirectionSums(negatives, LogSum(own, own))  # a total of one term is not read
    positives = LogSum(torch.empty_like(totals), torch.empty_like(totals))
    arguments = (problem.reference, *positives)
    problem.lines(kernels.online_sums, axis, *arguments, POSITIVES=True, **settings)
    return DirectionSums(negatives, positives)


def losses_of_sums(
    sums: DirectionSums, entries: Entries, settings: TileSettings
) -> tuple[Tensor, Tensor]:
    """Return the sum of one direction's losses, and their statistics, as in `torch_blocks`."""
    negatives, positives = sums
    n = len(negatives.maximum)
    statistics = negatives.maximum.new_empty(n, 3)
    partial_sums = negatives.maximum.new_empty(_blocks(n))
    valid = entries.partner if entries.valid is None else entries.valid  # a placeholder: not read
    _launch(
        kernels.losses,
        partial_sums,
        *(*negatives, *positives, valid, statistics, partial_sums, n, settings.smoothing),
        POSITIVES=entries.group_matches,
        VALID=entries.valid is not None,
        DECOUPLED=settings.decoupled,
    )
    return partial_sums.sum(), statistics


def contrast_gradients(
    blocks: LossBlocks,
    entries: Entries,
    row_statistics: Tensor,
    columns: tuple[Tensor, Tensor] | None,
    *,
    whole: Tensor,
    batch: GlobalBatch,
    weight: Tensor,
    rows: int,
) -> BlockGradients:
    """Return the gradients of the weighted losses, as in `torch_blocks`."""
    problem = _KernelProblem(blocks, entries, whole, _bound(blocks, whole))
    both = columns is not None
    rows_of, columns_of = (
        _terms(*statistics, problem.reference)
        for statistics in ((row_statistics, weight), columns or (row_statistics, weight))
    )

    def launch(chunk: _Chunk, sides: _Sides, gradient: TensorDescriptor, sums: Tensor) -> None:
        terms = rows_of[0], columns_of[0], rows_of[1], columns_of[1]
        arguments = (problem.reference, *terms, gradient, sums)
        problem.tiles(kernels.contrast_gradient, _TILE, chunk, sides, *arguments, BOTH=both)

    return _gradients(problem, launch, batch, rows)


def sigmoid_sum(
    blocks: LossBlocks,
    entries: Entries,
    *,
    whole: Tensor,
    batch: GlobalBatch,
    rows: int,  # noqa: ARG001 - memory does not depend on it
) -> Tensor:
    """Return the sum of softplus(-z * logit), z = +1 for a positive, else -1."""
    blocks, whole = _at_norm(blocks, whole, batch)
    problem, total = _KernelProblem(blocks, entries, whole), torch.zeros_like(blocks.scale)
    height = _rounded_up(max(_CHUNK_ROWS, _FORWARD_LOGITS // problem.m))
    for chunk in problem.chunks(height, _FORWARD_COLUMNS):
        down, across = chunk.tiles()
        sums = total.new_zeros(down * across)
        sides = _sides(blocks.anchors[chunk.rows], whole[chunk.columns])
        problem.tiles(kernels.sigmoid_losses, _TILE, chunk, sides, sums)
        total += sums.sum()
    return total


def sigmoid_gradients(
    blocks: LossBlocks,
    entries: Entries,
    *,
    whole: Tensor,
    batch: GlobalBatch,
    weight: Tensor,
    rows: int,
) -> BlockGradients:
    """Return `weight` times the gradients of `sigmoid_sum`, for the features of this rank."""
    problem = _KernelProblem(blocks, entries, whole)

    def launch(chunk: _Chunk, sides: _Sides, gradient: TensorDescriptor, sums: Tensor) -> None:
        arguments = (weight, gradient, sums, sums.shape[1])
        problem.tiles(kernels.sigmoid_gradient, _TILE, chunk, sides, *arguments)

    return _gradients(problem, launch, batch, rows)


def _gradients(
    problem: _KernelProblem, launch: _Launch, batch: GlobalBatch, rows: int
) -> BlockGradients:
    """Return the gradients of features and scalars from those of the logits, chunk by chunk."""
    anchors, candidates, scale, _, normalize = problem.blocks
    row_gradients = torch.empty_like(anchors)
    new = scale.new_empty if problem.n else scale.new_zeros
    column_total = None if candidates is None else new(problem.whole.shape)
    late = normalize and batch.world_size == 1
    sums = _add_chunks(problem, launch, row_gradients, column_total, late=late, rows=rows)
    scale_gradient, bias_gradient = (one.sum() for one in sums)
    if candidates is None or column_total is None:
        # The gradient of a logit is that of its row's and its column's loss: each counts twice.
        return BlockGradients(row_gradients, None, scale_gradient / 2, bias_gradient)
    # The memory of the chunk is free again here.
    column_total = batch.scatter(column_total)
    column_gradients = feature_gradients(column_total, candidates, scale, normalize=normalize)
    return BlockGradients(row_gradients, column_gradients, scale_gradient, bias_gradient)


def _add_chunks(
    problem: _KernelProblem,
    launch: _Launch,
    row_gradients: Tensor,
    column_total: Tensor | None,
    *,
    late: bool,
    rows: int,
) -> Tensor:
    """Write the rows' gradients and the columns' total, and return the sums of the tiles.

    A chunk holds as many logits as `rows` rows have. Features are normalised chunk by chunk too,
    candidates only if `late`; normalised rows are kept in the memory of their gradients until those
    are written.
    """
    anchors, _, scale, _, normalize = problem.blocks
    height = min(_CHUNK_ROWS, _rounded_up(max(problem.n, 1)))
    width = min(_rounded_up(max(rows * problem.m // height, 1)), _rounded_up(problem.m))
    down, across = _Chunk(0, 0, height, width).tiles()
    sums = scale.new_zeros(2, down * across)
    memory = anchors.new_empty(height, width, dtype=torch.bfloat16)
    row_total = scale.new_empty(min(height, problem.n), anchors.shape[1])
    spare = anchors.new_empty(width if late else 0, anchors.shape[1])
    for chunk in problem.chunks(height, width):
        gradient, total = memory[: chunk.height, : chunk.width], row_total[: chunk.height]
        left, right, done = (
            anchors[chunk.rows],
            problem.whole[chunk.columns],
            row_gradients[chunk.rows],
        )
        if normalize:
            left = normalize_features(left, done) if chunk.column == 0 else done
        if late:
            right = normalize_features(right, spare[: chunk.width])
        written = TensorDescriptor.from_tensor(gradient, [_TILE["ROWS"], _TILE["COLUMNS"]])
        launch(chunk, _sides(left, right), written, sums)
        _add_product(total, gradient, right, first=chunk.column == 0)
        if column_total is not None:
            _add_product(column_total[chunk.columns], gradient.T, left, first=chunk.row == 0)
        if chunk.column + chunk.width == problem.m:
            features = anchors[chunk.rows]
            feature_gradients(total, features, scale, normalize=normalize, out=done)
    return sums


def feature_gradients(
    totals: Tensor, features: Tensor, factor: Tensor, *, normalize: bool, out: Tensor | None = None
) -> Tensor:
    """Return the features' gradients [rows, D] from totals: multiply, then undo the normalisation.

    Args:
        totals: [rows, D], float32: the gradients for features at unit norm, without the factor.
        features: [rows, D], not normalised.
        factor: 0-dim, float32.
        normalize: Whether the totals are for normalised features.
        out: The tensor to write to, in the features' dtype.
    """
    out = torch.empty_like(features) if out is None else out
    size = features.shape[1]
    if len(features):
        kernels.feature_gradients[(len(features),)](
            *(totals, features, factor, out),
            NORMALIZE=normalize,
            SIZE=size,
            BLOCK=triton.next_power_of_2(size),
        )
    return out


def _at_norm(blocks: LossBlocks, whole: Tensor, batch: GlobalBatch) -> tuple[LossBlocks, Tensor]:
    """Return the blocks with normalised features, and the normalised candidates of all ranks."""
    if not blocks.normalize:
        return blocks, whole
    anchors = normalize_features(blocks.anchors)
    if batch.world_size == 1:
        whole = anchors if blocks.candidates is None else normalize_features(whole)
    return blocks._replace(anchors=anchors, normalize=False), whole


def normalize_features(features: Tensor, out: Tensor | None = None) -> Tensor:
    """Return features [rows, D] divided by their norms; a row without a direction becomes 0."""
    out = torch.empty_like(features) if out is None else out
    size = features.shape[1]
    if len(features):
        kernels.normalize_features[(len(features),)](
            features, out, SIZE=size, BLOCK=triton.next_power_of_2(size)
        )
    return out


def _sides(anchors: Tensor, candidates: Tensor) -> _Sides:
    """Return the descriptors by which the kernels load features."""
    return (
        TensorDescriptor.from_tensor(anchors, [_TILE["ROWS"], _TILE["STEP"]]),
        TensorDescriptor.from_tensor(candidates, [_TILE["COLUMNS"], _TILE["STEP"]]),
    )


def _add_sums(total: Tensor, sums: Tensor, *, first: bool) -> None:
    """Add the sums of tiles, [tiles, length], to a total [length], in place; to 0 if first."""
    if first:
        torch.sum(sums, 0, out=total)
    else:
        total += sums.sum(0)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> None:
    """Add left @ right to a float32 total, in place; to 0 if it is the first."""
    right = right.to(left.dtype)
    if first:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _bound(blocks: LossBlocks, whole: Tensor, *, over_ranks: bool = False) -> Tensor | None:
    """Return a bound on the products of features, 0-dim; None: 1, features have unit norm at most.

    Args:
        blocks: The features, normalised later or not.
        whole: The candidates of all ranks.
        over_ranks: Whether all ranks need the same bound.
    """
    if blocks.normalize:
        return None
    bound = torch.ones_like(blocks.scale)
    for side in (blocks.anchors, whole):
        if len(side):
            bound *= torch.linalg.vector_norm(side, dim=1, dtype=torch.float32).amax()
    return max_over_ranks(bound) if over_ranks else bound


def _terms(statistics: Tensor, weights: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return `kernels.gradient_terms` of rows, [5, n], and which tiles are exact.

    Args:
        statistics: [n, 3], from `losses_of_sums`.
        weights: 0-dim or [n], the weights of the rows' losses.
        reference: 0-dim.
    """
    n = len(statistics)
    terms, exact = statistics.new_empty(5, n), statistics.new_empty(_blocks(n), dtype=torch.int32)
    _launch(
        kernels.gradient_terms,
        exact,
        *(statistics, statistics.stride(0), weights, reference, terms, exact, n),
        WEIGHTED=weights.dim() > 0,
        DEPTH=_DEPTH,
    )
    return terms, exact


def _launch(kernel: Any, blocks: Tensor, *arguments: Any, **settings: Any) -> None:
    """Run a kernel on every block of rows; `blocks` has one entry for each."""
    if len(blocks):
        kernel[(len(blocks),)](*arguments, **settings, ROWS=_SIDE)


def _blocks(rows: int) -> int:
    """Return the number of blocks of rows."""
    return -(-rows // _SIDE)


def _rounded_up(count: int) -> int:
    """Return the next multiple at which chunks may begin."""
    return _blocks(count) * _SIDE
