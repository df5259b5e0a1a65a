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

from diptych.losses.base.tiles import triton_kernels as kernels
from diptych.losses.base.tiles.torch_blocks import (
    BlockGradients,
    Entries,
    LineSums,
    LogSum,
    LossBlocks,
    TileSettings,
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
argument and adds each tile's gradients of scale and bias, and loss, to the fourth, [3, tiles]."""


class _KernelProblem:
    """The arguments of the kernels.

    Args:
        blocks: The features, normalised or, chunk by chunk, to be normalised.
        entries: The kind of each logit.
        whole: The candidates of all ranks.
        unit: Whether the features that are multiplied have norm 1 at most.
    """

    def __init__(self, blocks: LossBlocks, entries: Entries, whole: Tensor, *, unit: bool) -> None:
        anchors, _, scale, bias, _ = self.blocks = blocks
        self.whole = whole
        self.description = _description(blocks, entries, whole, unit=unit)
        self.n, self.m = anchors.shape[0], whole.shape[0]
        self.scalars = [scale] if bias is None else [scale, bias]
        group, groups = kernels.NEGATIVE, [entries.partner] * 2  # placeholders: not read
        if entries.row_groups is not None and entries.column_groups is not None:
            group = kernels.POSITIVE if entries.group_matches else kernels.NEITHER
            groups = [entries.row_groups.contiguous(), entries.column_groups.contiguous()]
        self.inputs = [self.description, *groups]
        self.settings = {
            "WIDTH": anchors.shape[1],
            "ITSELF": entries.itself is not None,
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

    def lines(self, kernel: Any, count: int, *arguments: Any, **settings: Any) -> None:
        """Run a kernel on every block of `count` lines."""
        chunk, sides = _Chunk(0, 0, self.n, self.m), _sides(self.blocks.anchors, self.whole)
        arguments = (*arguments, count)
        self._run(kernel, _line_blocks(self.n, count), chunk, sides, arguments, **_TILE, **settings)

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


def _description(blocks: LossBlocks, entries: Entries, whole: Tensor, *, unit: bool) -> Tensor:
    """Return what the kernels need to know of the logits, int32 (`kernels.describe_rows`)."""
    partner, scale, n = entries.partner, blocks.scale, len(blocks.anchors)
    bound = scale if unit else _bound(blocks, whole)
    description = partner.new_empty(4 + 3 * n + 6 * max(_blocks(n), 1), dtype=torch.int32)
    if n:
        kernels.describe_rows[(_blocks(n),)](
            partner,
            partner if entries.inverse is None else entries.inverse,
            partner if entries.itself is None else entries.itself,
            *(description, scale, bound, n),
            ITSELF=entries.itself is not None,
            BOUNDED=not unit,
            HEADROOM=_HEADROOM,
            ROWS=_SIDE,
        )
    return description


def contrast_sums(
    blocks: LossBlocks,
    entries: Entries,
    *,
    whole: Tensor,
    symmetric: bool,
    rows: int,  # noqa: ARG001 - memory does not depend on it
) -> LineSums:
    """Return the sums of the rows and, if symmetric, of all columns, as in `torch_blocks`.

    If all candidates are the anchors, the matrix is symmetric, and half of it is computed.
    """
    problem = _at_norm(blocks, entries, whole)
    upper = blocks.candidates is None and problem.n == problem.m
    own, totals = _bounded_sums(problem, columns=symmetric, upper=upper)
    negatives = _exact_where_needed(problem, totals, positives=False)
    if not entries.group_matches:
        return LineSums(negatives, LogSum(own, own))  # a total of one term is not read
    positives = _exact_where_needed(problem, torch.empty_like(totals), positives=True)
    return LineSums(negatives, positives)


def _bounded_sums(problem: _KernelProblem, *, columns: bool, upper: bool) -> tuple[Tensor, Tensor]:
    """Return the logits of own pairs [n], and the sums of the negatives of all lines.

    Sums are relative to the reference. With `upper` only one half of a symmetric matrix is
    computed, and the sums of rows and columns are the same.
    """
    n, m = problem.n, problem.m
    both = columns or upper
    sums = problem.blocks.scale.new_zeros(2 * n + m * columns)
    own, totals = sums[:n], sums[n:]
    row_total, column_total = totals[:n], totals if upper else totals[n:]
    new = sums.new_zeros if upper else sums.new_empty  # tiles below the diagonal write nothing
    height = _rounded_up(max(_CHUNK_ROWS, _FORWARD_LOGITS // m))
    for chunk in problem.chunks(height, _FORWARD_COLUMNS, upper=upper):
        down, across = chunk.tiles()
        row_sums, column_sums = new(across, chunk.height), new(down, chunk.width * both)
        sides = _sides(problem.blocks.anchors[chunk.rows], problem.whole[chunk.columns])
        arguments = (own, row_sums, column_sums)
        problem.tiles(kernels.bounded_sums, _TILE, chunk, sides, *arguments, BOTH=both, UPPER=upper)
        _add_sums(row_total[chunk.rows], row_sums, first=chunk.column == 0 and not upper)
        if both:
            first = chunk.row == 0 and not upper
            _add_sums(column_total[chunk.columns], column_sums, first=first)
    return own, totals


def _exact_where_needed(problem: _KernelProblem, totals: Tensor, *, positives: bool) -> LogSum:
    """Return the logsumexps of lines, over negatives or positives.

    Args:
        problem: The arguments of the kernels.
        totals: The sums of negatives relative to the reference. Where terms may be lost, and those
            of positives everywhere, they are computed again, in place.
        positives: Whether to sum positives.
    """
    if not problem.n:  # a rank without samples
        return LogSum.empty(totals, len(totals))
    sums = LogSum(torch.empty_like(totals), totals)
    problem.lines(kernels.online_sums, len(totals), *sums, POSITIVES=positives, LEAST=2.0**-_DEPTH)
    return sums


def losses_of_sums(
    sums: LineSums, columns: Tensor, entries: Entries, settings: TileSettings
) -> tuple[Tensor, Tensor]:
    """Return the sum of all lines' losses, and their statistics, as in `torch_blocks`."""
    negatives, positives = sums
    n = len(entries.partner)
    count = n + columns.shape[-1] if len(columns) else len(negatives.maximum)
    statistics = negatives.maximum.new_empty(count, 3)
    partial_sums = negatives.maximum.new_empty(_line_blocks(n, count))
    valid = entries.partner if entries.valid is None else entries.valid  # a placeholder: not read
    if count:
        kernels.losses[(len(partial_sums),)](
            *(*negatives, *positives, columns, *columns.shape[:1], *columns.stride()[:2], valid),
            *(statistics, partial_sums, n, count, settings.smoothing),
            POSITIVES=entries.group_matches,
            COMPLETED=len(columns) > 0,
            VALID=entries.valid is not None,
            DECOUPLED=settings.decoupled,
            ROWS=_SIDE,
        )
    return partial_sums.sum(), statistics


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
    """Return the gradients of the weighted losses, as in `torch_blocks`."""
    problem = _KernelProblem(blocks, entries, whole, unit=blocks.normalize)
    n, m, count = problem.n, problem.m, len(statistics)
    terms = statistics.new_empty(5, count)
    exact = statistics.new_empty(_line_blocks(n, count), dtype=torch.int32)
    if count:
        kernels.gradient_terms[(len(exact),)](
            *(
                statistics,
                statistics.stride(0),
                weights,
                problem.description,
                terms,
                exact,
                n,
                count,
            ),
            WEIGHTED=weights.dim() > 0,
            DEPTH=_DEPTH,
            ROWS=_SIDE,
        )
    of_columns = terms[:, -m:], count, exact, exact[-_blocks(m) :]

    def launch(chunk: _Chunk, sides: _Sides, gradient: TensorDescriptor, sums: Tensor) -> None:
        arguments = (terms, *of_columns, gradient, sums)
        problem.tiles(kernels.contrast_gradient, _TILE, chunk, sides, *arguments, BOTH=columns)

    return _gradients(problem, launch, rows, finish=True)[0]


def sigmoid_gradients(
    blocks: LossBlocks, entries: Entries, *, whole: Tensor, settings: TileSettings
) -> tuple[Tensor, BlockGradients]:
    """Return the sum of softplus(-z * logit), and its gradients, as in `torch_blocks`.

    Those of the features are without the scale, and of normalised features: see `finished`.
    """
    problem, wanted = _at_norm(blocks, entries, whole), settings.gradient

    def launch(chunk: _Chunk, sides: _Sides, gradient: TensorDescriptor, sums: Tensor) -> None:
        arguments = (gradient, sums, sums.shape[1])
        problem.tiles(kernels.sigmoid_gradient, _TILE, chunk, sides, *arguments, GRADIENT=wanted)

    if not wanted:
        return _summed(problem, launch), BlockGradients.zeros(blocks, whole)
    gradients, total = _gradients(problem, launch, settings.rows, finish=False)
    return total, gradients


def _summed(problem: _KernelProblem, launch: _Launch) -> Tensor:
    """Return the summed loss alone; the kernel writes no gradient."""
    blocks, whole = problem.blocks, problem.whole
    height = _rounded_up(max(_CHUNK_ROWS, _FORWARD_LOGITS // problem.m))
    sums = blocks.scale.new_zeros(3, _blocks(height) * _blocks(_FORWARD_COLUMNS))
    unwritten = TensorDescriptor.from_tensor(
        blocks.anchors.new_empty(_SIDE, _SIDE, dtype=torch.bfloat16), [_SIDE, _SIDE]
    )
    for chunk in problem.chunks(height, _FORWARD_COLUMNS):
        launch(chunk, _sides(blocks.anchors[chunk.rows], whole[chunk.columns]), unwritten, sums)
    return sums[2].sum()


def _gradients(
    problem: _KernelProblem, launch: _Launch, rows: int, *, finish: bool
) -> tuple[BlockGradients, Tensor]:
    """Return the gradients of features and scalars from those of the logits, and the summed loss.

    Args:
        problem: The arguments of the kernels.
        launch: Launches the kernel for a chunk.
        rows: A chunk holds as many logits as so many rows have.
        finish: Whether to finish the rows' gradients; otherwise they are totals.
    """
    anchors, candidates, scale, _, _ = problem.blocks
    new = scale.new_empty if problem.n else scale.new_zeros
    row_gradients = torch.empty_like(anchors) if finish else new(anchors.shape)
    column_total = None if candidates is None else new(problem.whole.shape)
    sums = _add_chunks(problem, launch, row_gradients, column_total, rows)
    scale_gradient, bias_gradient, total = sums.sum(1).unbind()
    return BlockGradients(row_gradients, column_total, scale_gradient, bias_gradient), total


def finished(total: Tensor, features: Tensor, blocks: LossBlocks) -> Tensor:
    """Return the gradient of features, as in `torch_blocks`."""
    return feature_gradients(total, features, blocks.scale, normalize=blocks.normalize)


def _add_chunks(
    problem: _KernelProblem,
    launch: _Launch,
    row_gradients: Tensor,
    column_total: Tensor | None,
    rows: int,
) -> Tensor:
    """Write the rows' gradients and the columns' total, and return the sums of the tiles.

    The rows' gradients are totals in float32, or in the features' dtype finished. A chunk holds as
    many logits as `rows` rows have. Features are normalised chunk by chunk too, candidates only if
    they are those of this rank; normalised rows are kept in the memory of their gradients until
    those are written.
    """
    anchors, _, scale, _, normalize = problem.blocks
    finish = row_gradients.dtype == anchors.dtype
    late = normalize and problem.whole is problem.blocks.piece
    height = min(_CHUNK_ROWS, _rounded_up(max(problem.n, 1)))
    width = min(_rounded_up(max(rows * problem.m // height, 1)), _rounded_up(problem.m))
    down, across = _Chunk(0, 0, height, width).tiles()
    sums = scale.new_zeros(3, down * across)
    memory = anchors.new_empty(height, width, dtype=torch.bfloat16)
    buffer = scale.new_empty(min(height, problem.n) if finish else 0, anchors.shape[1])
    spare = anchors.new_empty(width if late else 0, anchors.shape[1])
    for chunk in problem.chunks(height, width):
        gradient = memory[: chunk.height, : chunk.width]
        done = row_gradients[chunk.rows]
        total = buffer[: chunk.height] if finish else done
        left, right = _multiplied(problem, chunk, done, spare)
        written = TensorDescriptor.from_tensor(gradient, [_TILE["ROWS"], _TILE["COLUMNS"]])
        launch(chunk, _sides(left, right), written, sums)
        _add_product(total, gradient, right, first=chunk.column == 0)
        if column_total is not None:
            _add_product(column_total[chunk.columns], gradient.T, left, first=chunk.row == 0)
        if finish and chunk.column + chunk.width == problem.m:
            features = anchors[chunk.rows]
            feature_gradients(total, features, scale, normalize=normalize, out=done)
    return sums


def _multiplied(
    problem: _KernelProblem, chunk: _Chunk, rows: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a chunk's anchors and candidates as they are multiplied.

    Anchors that are to be normalised are written to `rows`, with the first columns; candidates to
    `spare` unless that is empty.
    """
    left, right = problem.blocks.anchors[chunk.rows], problem.whole[chunk.columns]
    if not problem.blocks.normalize:
        return left, right
    given = [(left, rows)] if chunk.column == 0 else []
    if len(spare):
        given.append((right, spare[: chunk.width]))
        right = spare[: chunk.width]
    _normalize(given)
    return rows, right


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


def _at_norm(blocks: LossBlocks, entries: Entries, whole: Tensor) -> _KernelProblem:
    """Return the arguments of the kernels with all features normalised, if they are to be."""
    unit = blocks.normalize
    if unit:
        shared = blocks.candidates is None and len(whole) == len(blocks.anchors)
        anchors = whole if shared else normalize_features(blocks.anchors)[0]
        blocks = blocks._replace(anchors=anchors, normalize=False)
    return _KernelProblem(blocks, entries, whole, unit=unit)


def normalize_features(*sides: Tensor) -> list[Tensor]:
    """Return one or two sides [rows, D] at norm 1; a row without a direction becomes 0."""
    normalized = [torch.empty_like(side) for side in sides]
    _normalize(list(zip(sides, normalized, strict=True)))
    return normalized


def _normalize(sides: list[tuple[Tensor, Tensor]]) -> None:
    """Write the normalised features of none, one or two sides to the second of each pair."""
    count, size = sum(len(features) for features, _ in sides), sides[0][0].shape[1] if sides else 0
    if count:
        kernels.normalize_features[(count,)](
            *(*sides[0], *sides[-1], len(sides[0][0])),
            SIZE=size,
            BLOCK=triton.next_power_of_2(size),
        )


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


def _bound(blocks: LossBlocks, whole: Tensor) -> Tensor:
    """Return a bound on the products of features, 0-dim."""
    bound = torch.ones_like(blocks.scale)
    for side in (blocks.anchors, whole):
        if len(side):
            bound *= torch.linalg.vector_norm(side, dim=1, dtype=torch.float32).amax()
    return bound


def _blocks(rows: int) -> int:
    """Return the number of blocks of rows."""
    return -(-rows // _SIDE)


def _line_blocks(rows: int, count: int) -> int:
    """Return the number of blocks of `count` lines, of which rows and columns have their own."""
    return _blocks(rows) + _blocks(count - rows)


def _rounded_up(count: int) -> int:
    """Return the next multiple at which chunks may begin."""
    return _blocks(count) * _SIDE
