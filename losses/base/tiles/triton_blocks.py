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
    DirectionSums,
    Entries,
    LogSum,
    LossBlocks,
)

_TILE = {"ROWS": 128, "COLUMNS": 128, "STEP": 64, "num_warps": 4, "num_stages": 3}
_BLOCK = [_TILE["ROWS"], _TILE["COLUMNS"]]
_BAND = 16
_LOG2_E = 1.4426950408889634

# 2**20 terms of up to 2**_HEADROOM stay in float32's range. A sum below 2**-_DEPTH may have lost
# significant terms.
_HEADROOM = 100.0
_DEPTH = 80.0

_CHUNK_ROWS = 8192
_FORWARD_COLUMNS = 65536


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

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles down and across."""
        return -(-self.height // _TILE["ROWS"]), -(-self.width // _TILE["COLUMNS"])


_Sides = tuple[TensorDescriptor, TensorDescriptor]
"""A chunk's anchors and candidates, as the kernels load them."""

_Launch = Callable[[_Chunk, _Sides, TensorDescriptor, Tensor], None]
"""Launches a kernel that writes the gradient of a chunk of logits [height, width] to the third
argument and adds each tile's gradients of scale and bias to the fourth, [2, tiles]."""


class _KernelProblem:
    """The arguments of the kernels, for features at unit norm."""

    def __init__(self, blocks: LossBlocks, entries: Entries) -> None:
        anchors, candidates, scale, bias, _ = self.blocks = blocks
        self.n, self.m = anchors.shape[0], candidates.shape[0]
        self.scalars = [scale] if bias is None else [scale, bias]
        partner = entries.partner.to(torch.int32)
        itself = partner if entries.itself is None else entries.itself.to(torch.int32)
        group, groups = kernels.NEGATIVE, [partner, partner]  # placeholders: not read
        if entries.row_groups is not None and entries.column_groups is not None:
            group = kernels.POSITIVE if entries.group_matches else kernels.NEITHER
            groups = [entries.row_groups.contiguous(), entries.column_groups.contiguous()]
        self.inputs = [partner, itself, *groups]
        self.settings = {
            "WIDTH": anchors.shape[1],
            "ITSELF": entries.itself is not None,
            "GROUP": group,
            **_TILE,
        }

    def tiles(
        self, kernel: Any, chunk: _Chunk, sides: _Sides, *arguments: Any, **settings: Any
    ) -> None:
        """Run a kernel on every tile of a chunk."""
        down, across = chunk.tiles
        self._run(kernel, down * across, chunk, sides, arguments, BAND=_BAND, **settings)

    def rows(self, kernel: Any, sides: _Sides, *arguments: Any, **settings: Any) -> None:
        """Run a kernel on every row of tiles."""
        whole = _Chunk(0, 0, self.n, self.m)
        self._run(kernel, whole.tiles[0], whole, sides, arguments, **settings)

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
        with torch.cuda.device(self.scalars[0].device):
            kernel[(programs,)](
                *sides, *self.inputs, *shape, *self.scalars, *arguments, **settings, **self.settings
            )

    def chunks(self, height: int, width: int) -> Iterator[_Chunk]:
        """Yield chunks of the logits, along the columns first."""
        for row in range(0, self.n, height):
            for column in range(0, self.m, width):
                lengths = min(height, self.n - row), min(width, self.m - column)
                yield _Chunk(row, column, *lengths)


def contrast_sums(
    blocks: LossBlocks,
    entries: Entries,
    *,
    symmetric: bool,
    rows: int,  # noqa: ARG001 - memory does not depend on it
) -> tuple[DirectionSums, DirectionSums | None]:
    """Return the sums of the rows and, if symmetric, of the columns, as in `torch_blocks`."""
    reference, blocks = _reference(blocks), _at_norm(blocks)
    problem = _KernelProblem(blocks, entries)
    n, m = problem.n, problem.m
    own, row_total = blocks.scale.new_zeros(2, n)
    column_total = blocks.scale.new_zeros(m if symmetric else 0)
    for chunk in problem.chunks(_CHUNK_ROWS, _FORWARD_COLUMNS):
        down, across = chunk.tiles
        sums = own.new_empty(across, chunk.height), own.new_empty(down, chunk.width * symmetric)
        sides = _sides(blocks.anchors[chunk.rows], blocks.candidates[chunk.columns])
        problem.tiles(kernels.bounded_sums, chunk, sides, reference, own, *sums, BOTH=symmetric)
        row_total[chunk.rows] += sums[0].sum(0)
        if symmetric:
            column_total[chunk.columns] += sums[1].sum(0)
    least = torch.cat([row_total, column_total]).amin()
    exact = (~(least >= 2**-_DEPTH)).to(torch.int32)
    bound = reference / _LOG2_E
    row_sums = _with_positives(problem, entries, LogSum(bound.repeat(n), row_total), own, exact)
    if not symmetric:
        return row_sums, None
    turned = entries._replace(row_groups=entries.column_groups, column_groups=entries.row_groups)
    problem = _KernelProblem(LossBlocks(blocks.candidates, blocks.anchors, blocks.scale), turned)
    negatives = LogSum(bound.repeat(m), column_total)
    return row_sums, _with_positives(problem, entries, negatives, own, exact)


def _with_positives(
    problem: _KernelProblem, entries: Entries, negatives: LogSum, own: Tensor, exact: Tensor
) -> DirectionSums:
    """Return the sums of rows; recompute those of negatives if `exact` is not 0 on the device."""
    sides = _sides(*problem.blocks[:2])
    problem.rows(kernels.online_sums, sides, exact, *negatives, POSITIVES=False)
    if not entries.group_matches:
        return DirectionSums(negatives, LogSum(own, torch.ones_like(own)))
    positives = LogSum.empty(own, problem.n)
    problem.rows(kernels.online_sums, sides, torch.ones_like(exact), *positives, POSITIVES=True)
    return DirectionSums(negatives, positives)


def contrast_gradients(
    blocks: LossBlocks,
    entries: Entries,
    row_statistics: Tensor,
    column_statistics: Tensor | None,
    *,
    weight: Tensor,
    rows: int,
) -> BlockGradients:
    """Return `weight` times the gradients of the summed losses, as in `torch_blocks`."""
    problem, reference = _KernelProblem(blocks, entries), _reference(blocks)
    both = column_statistics is not None
    row_terms = column_terms = _terms(row_statistics, reference)
    pull = row_statistics[1]
    if column_statistics is not None:
        column_terms = _terms(column_statistics, reference)
        pull = pull + column_statistics[1][entries.partner]
    least = torch.minimum(row_terms[0].amin(), column_terms[0].amin())
    exact = (~(least >= reference - _DEPTH)).to(torch.int32)

    def launch(chunk: _Chunk, sides: _Sides, gradient: TensorDescriptor, sums: Tensor) -> None:
        arguments = (reference, exact, pull, row_terms, column_terms, gradient, sums)
        problem.tiles(kernels.contrast_gradient, chunk, sides, *arguments, BOTH=both)

    return _gradients(problem, launch, weight, rows)


def sigmoid_sum(
    blocks: LossBlocks,
    entries: Entries,
    *,
    rows: int,  # noqa: ARG001 - memory does not depend on it
) -> Tensor:
    """Return the sum of softplus(-z * logit), z = +1 for a positive, else -1."""
    blocks = _at_norm(blocks)
    problem, total = _KernelProblem(blocks, entries), torch.zeros_like(blocks.scale)
    for chunk in problem.chunks(_CHUNK_ROWS, _FORWARD_COLUMNS):
        down, across = chunk.tiles
        sums = total.new_zeros(down * across)
        sides = _sides(blocks.anchors[chunk.rows], blocks.candidates[chunk.columns])
        problem.tiles(kernels.sigmoid_losses, chunk, sides, sums)
        total += sums.sum()
    return total


def sigmoid_gradients(
    blocks: LossBlocks, entries: Entries, *, weight: Tensor, rows: int
) -> BlockGradients:
    """Return `weight` times the gradients of `sigmoid_sum`."""
    problem = _KernelProblem(blocks, entries)

    def launch(chunk: _Chunk, sides: _Sides, gradient: TensorDescriptor, sums: Tensor) -> None:
        problem.tiles(kernels.sigmoid_gradient, chunk, sides, gradient, sums, sums.shape[1])

    return _gradients(problem, launch, weight, rows)


def _gradients(
    problem: _KernelProblem, launch: _Launch, weight: Tensor, rows: int
) -> BlockGradients:
    """Return the gradients of features and scalars from those of the logits, chunk by chunk."""
    anchors, candidates, scale, _, normalize = problem.blocks
    factor = scale * weight
    row_gradients = torch.empty_like(anchors)
    column_total = factor.new_zeros(candidates.shape)
    sums = _add_chunks(problem, launch, factor, (row_gradients, column_total), rows=rows)
    # The memory of the chunk is free again here.
    column_gradients = feature_gradients(column_total, candidates, factor, normalize=normalize)
    return BlockGradients(row_gradients, column_gradients, *(one.sum() * weight for one in sums))


def _add_chunks(
    problem: _KernelProblem,
    launch: _Launch,
    factor: Tensor,
    gradients: tuple[Tensor, Tensor],
    *,
    rows: int,
) -> Tensor:
    """Write the rows' gradients, add to the columns' total, and return the sums of the tiles.

    A chunk holds as many logits as `rows` rows have. Features are normalised chunk by chunk too;
    normalised rows are kept in the memory of their gradients until those are written.
    """
    anchors, candidates, _, _, normalize = problem.blocks
    row_gradients, column_total = gradients
    height = min(_CHUNK_ROWS, _rounded_up(problem.n))
    width = min(_rounded_up(rows * problem.m // height + 1), _rounded_up(problem.m))
    sums = factor.new_zeros(2, height // _TILE["ROWS"] * (width // _TILE["COLUMNS"]))
    memory = anchors.new_empty(height, width, dtype=torch.bfloat16)
    row_total = factor.new_empty(min(height, problem.n), anchors.shape[1])
    spare = anchors.new_empty(width if normalize else 0, anchors.shape[1])
    for chunk in problem.chunks(height, width):
        gradient, total = memory[: chunk.height, : chunk.width], row_total[: chunk.height]
        left, right, done = (
            anchors[chunk.rows],
            candidates[chunk.columns],
            row_gradients[chunk.rows],
        )
        if normalize:
            left = normalize_features(left, done) if chunk.column == 0 else done
            right = normalize_features(right, spare[: chunk.width])
        launch(chunk, _sides(left, right), TensorDescriptor.from_tensor(gradient, _BLOCK), sums)
        _add_product(total, gradient, right, first=chunk.column == 0)
        _add_product(column_total[chunk.columns], gradient.T, left)
        if chunk.column + chunk.width == problem.m:
            features = anchors[chunk.rows]
            feature_gradients(total, features, factor, normalize=normalize, out=done)
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
    with torch.cuda.device(features.device):
        kernels.feature_gradients[(len(features),)](
            totals,
            features,
            factor,
            out,
            NORMALIZE=normalize,
            SIZE=size,
            BLOCK=triton.next_power_of_2(size),
        )
    return out


def _at_norm(blocks: LossBlocks) -> LossBlocks:
    """Return the blocks with normalised features."""
    if not blocks.normalize:
        return blocks
    anchors, candidates = (normalize_features(side) for side in blocks[:2])
    return blocks._replace(anchors=anchors, candidates=candidates, normalize=False)


def normalize_features(features: Tensor, out: Tensor | None = None) -> Tensor:
    """Return features [rows, D] divided by their norms; a row without a direction becomes 0."""
    out = torch.empty_like(features) if out is None else out
    size = features.shape[1]
    with torch.cuda.device(features.device):
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


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> None:
    """Add left @ right to a float32 total, in place; to 0 if it is the first."""
    right = right.to(left.dtype)
    if first:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _reference(blocks: LossBlocks) -> Tensor:
    """Return the exponent of 2 to which all sums are relative, 0-dim: a bound less a headroom."""
    bound = blocks.scale.abs() * _LOG2_E
    if blocks.normalize:
        return bound - _HEADROOM
    for side in blocks[:2]:
        bound = bound * torch.linalg.vector_norm(side, dim=1, dtype=torch.float32).amax()
    return bound - _HEADROOM


def _terms(statistics: Tensor, reference: Tensor) -> Tensor:
    """Return the statistics as exponents of 2, with the weights of the rows, [4, n]."""
    normalizer, pull, positive = statistics
    normalizer = normalizer * _LOG2_E
    weights = torch.exp2(reference - normalizer)
    return torch.stack([normalizer, pull, positive * _LOG2_E, weights])


def _rounded_up(count: int) -> int:
    """Return the next multiple of the side of a tile."""
    side = _TILE["ROWS"]
    return -(-count // side) * side
