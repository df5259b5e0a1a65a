"""Operators: the tiled losses as custom operators of torch, each with an operator of its gradient.

`torch.compile` keeps a custom operator whole. Outside of it `EagerOperator` calls the same
functions, since the way through an operator takes several times as long. The gradients are not
differentiable: a second derivative raises. A schema is a flat list of tensors and numbers;
`TiledLossArguments` is the only code that flattens the arguments and restores them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diptych.losses.base.gather import GlobalBatch, stack_over_ranks
from diptych.losses.base.tiles import torch_blocks
from diptych.losses.base.tiles.replay import Function, replayed
from diptych.losses.base.tiles.torch_blocks import (
    BlockGradients,
    Entries,
    LineSums,
    LossBlocks,
    TileSettings,
)
from diptych.losses.base.validation import HALF, working_dtype

_ARGUMENTS = (
    "Tensor anchors, Tensor? candidates, Tensor scale, Tensor? bias, bool normalize,"
    " Tensor partner, Tensor? inverse, Tensor? itself, Tensor? row_groups, Tensor? column_groups,"
    " bool group_matches, Tensor? valid,"
    " int rows, bool decoupled, float smoothing, bool symmetric, bool gradient,"
    " int[] sizes, int rank"
)
_COUNT = _ARGUMENTS.count(",") + 1

_REPLAYED_LOGITS = 2**28
"""A GPU takes longer for more logits than its host to launch the kernels."""


class TiledLossArguments(NamedTuple):
    """The arguments of every tiled operator, in the order of `_ARGUMENTS`."""

    blocks: LossBlocks
    entries: Entries
    settings: TileSettings
    batch: GlobalBatch

    def flat(self) -> tuple[Any, ...]:
        """Return all fields as one flat tuple, as an operator takes them."""
        return (*self.blocks, *self.entries, *self.settings, *self.batch)

    @classmethod
    def restored(cls, flat: tuple[Any, ...]) -> TiledLossArguments:
        """Return the arguments from a flat tuple."""
        return cls(
            LossBlocks(*flat[:5]),
            Entries(*flat[5:12]),
            TileSettings(*flat[12:17]),
            GlobalBatch(tuple(flat[17]), flat[18]),
        )

    @property
    def columns(self) -> int:
        """The number of columns, m."""
        return self.blocks.piece.shape[0] if self.batch.world_size == 1 else self.batch.total


def contrast(loss: TiledLossArguments) -> Tensor:
    """Return the sum of the InfoNCE losses."""
    return _total(_contrast, _contrast_gradient, loss)


def sigmoid_contrast(loss: TiledLossArguments) -> Tensor:
    """Return the sum of the pairwise sigmoid losses."""
    return _total(_sigmoid_contrast, _sigmoid_contrast_gradient, loss)


def _total(operator: Any, gradient: Any, loss: TiledLossArguments) -> Tensor:
    """Return the loss of an operator."""
    total: Tensor
    if torch.compiler.is_compiling():
        total = _OPERATORS[operator](*loss.flat())[0]
    else:
        differentiate = functools.partial(_differentiate, gradient)
        total = EagerOperator.apply(operator, _keep, differentiate, *loss.flat())  # type: ignore[no-untyped-call]
    return total


class EagerOperator(torch.autograd.Function):
    """An operator with its gradient, from the functions that a custom operator is made of.

    Arguments: the function; `keep(ctx, inputs, output)`; `differentiate(ctx, gradient)`; inputs.
    The result is the function's, or the first of several.
    """

    @staticmethod
    def forward(ctx: Any, operator: Any, keep: Any, differentiate: Any, *inputs: Any) -> Tensor:
        """Return the result, and keep what its gradient needs."""
        output = operator(*inputs)
        keep(ctx, inputs, output)
        ctx.differentiate = differentiate
        result: Tensor = output if isinstance(output, Tensor) else output[0]
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients for the inputs."""
        with torch.no_grad():
            found = ctx.differentiate(ctx, *gradients)
        if torch.is_grad_enabled():  # a second derivative is prepared
            sources = (*gradients, *(x for x in ctx.saved_tensors if x is not None))
            found = [None if one is None else _Refused.apply(one, *sources) for one in found]  # type: ignore[no-untyped-call]
        return (None, None, None, *found)


class _Refused(torch.autograd.Function):
    """The first argument, whose derivative for the others is refused: it would be silently 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:  # noqa: ARG004
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # noqa: ARG004
        raise RuntimeError(
            "a loss in tiles, or of half precision on a GPU, has no second derivative. Use "
            "tile=None and float32 features."
        )


def triton_runs_on(device: torch.device) -> bool:
    """Return whether the Triton kernels run on a device.

    They need tensor cores for bfloat16 (compute capability 8.0), and tensor descriptors and
    float32 results of half-precision products, both from Triton 3.4 and its torch on.
    """
    return device.type == "cuda" and _has_triton(device)


# The attribute that torch.compiler.assume_constant_result sets; that function imports the compiler.
triton_runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined] # noqa: SLF001


@functools.cache
def _has_triton(device: torch.device) -> bool:
    return (
        torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and "dtype_out" in torch.ops.aten.addmm.overloads()
        and importlib.util.find_spec("triton") is not None
        and importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    )


def kernels_take(features: Tensor, dtype: torch.dtype | None) -> bool:
    """Return whether the Triton kernels compute with features [n, D] converted to `dtype`."""
    return dtype in HALF and features.shape[1] % 8 == 0 and triton_runs_on(features.device)


@contextlib.contextmanager
def _on_device(features: Tensor) -> Iterator[None]:
    """Compute without autocast; kernels are launched on the features' device."""
    device, contexts = features.device, contextlib.ExitStack()
    with contexts:  # entering one takes as long as a kernel
        if torch.is_autocast_enabled(device.type):
            contexts.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            contexts.enter_context(torch.cuda.device(device))
        yield


def _backend(blocks: LossBlocks) -> Any:
    """Return the module that computes the blocks."""
    if not _on_kernels(blocks.anchors):
        return torch_blocks
    from diptych.losses.base.tiles import triton_blocks  # noqa: PLC0415 - needs Triton

    return triton_blocks


def _on_kernels(anchors: Tensor) -> bool:
    return kernels_take(anchors, anchors.dtype)


def _taken(loss: TiledLossArguments) -> tuple[Any, TiledLossArguments]:
    """Return the module that computes the blocks, and the arguments in the form that it takes."""
    anchors, candidates, scale, bias, normalize = loss.blocks
    backend, convert = _backend(loss.blocks), _aligned
    if backend is torch_blocks:
        convert = functools.partial(Tensor.to, dtype=working_dtype(anchors))
        normalize = False
    candidates = None if candidates is None else convert(candidates)
    blocks = LossBlocks(convert(anchors), candidates, scale, bias, normalize)
    return backend, loss._replace(blocks=blocks)


def _gathered(loss: TiledLossArguments) -> Tensor:
    """Return the candidates of all ranks, normalised if the blocks are to be."""
    piece = loss.blocks.piece
    if loss.blocks.normalize:
        (piece,) = _backend(loss.blocks).normalize_features(piece)
    with torch.no_grad():
        return loss.batch.gather(piece)


def _aligned(features: Tensor) -> Tensor:
    """Return features as a tensor descriptor needs them: contiguous, at a multiple of 16 bytes."""
    features = features.contiguous()
    return features if features.data_ptr() % 16 == 0 else features.clone()


def _replayed(function: Function, *, on_one_rank: bool) -> Function:
    """Replay a function of a loss's arguments if the host would be slower than the GPU.

    Args:
        function: Its last arguments are the flat `TiledLossArguments`.
        on_one_rank: Whether to do so on one rank or over several: an operator is replayed as a
            whole on one rank, and over several its parts that communicate nothing.
    """

    @functools.wraps(function)
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        loss = TiledLossArguments.restored(arguments[-_COUNT:])
        anchors = loss.blocks.anchors
        few = 0 < len(anchors) * loss.columns <= _REPLAYED_LOGITS
        if few and on_one_rank == (loss.batch.world_size == 1) and _on_kernels(anchors):
            return replayed(function, *arguments)
        return function(*arguments)

    return run


_operator = functools.partial(_replayed, on_one_rank=True)
_part = functools.partial(_replayed, on_one_rank=False)


@_operator
def _contrast(*flat: Any) -> tuple[Tensor, ...]:
    """Return the summed loss and what its gradient needs.

    These are the statistics [lines, 3], and over several ranks all candidates [m, D].
    """
    given = TiledLossArguments.restored(flat)
    with _on_device(given.blocks.anchors):
        backend, loss = _taken(given)
        whole = _gathered(loss)
        columns, packed = _line_sums(whole, *loss.flat())
        if len(columns):
            columns = stack_over_ranks(columns)[:, :, loss.batch.own]
        sums = LineSums.unpacked(packed, _lines(loss))
        total, statistics = backend.losses_of_sums(sums, columns, loss.entries, loss.settings)
    return total, statistics, _kept(whole, loss.batch)


def _lines(loss: TiledLossArguments) -> int:
    """Return the number of rows and, if they have losses too, of all ranks' columns."""
    return len(loss.blocks.anchors) + loss.settings.symmetric * loss.columns


@_part
def _line_sums(whole: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    """Return the columns that other ranks complete, and the packed sums."""
    blocks, entries, settings, batch = TiledLossArguments.restored(flat)
    sums = _backend(blocks).contrast_sums(
        blocks, entries, whole=whole, symmetric=settings.symmetric, rows=settings.rows
    )
    completed = settings.symmetric and batch.world_size > 1
    columns = sums.columns(entries) if completed else blocks.scale.new_empty(0, 2, 0)
    return columns, sums.packed()


def _kept(whole: Tensor, batch: GlobalBatch) -> Tensor:
    """Return the gathered candidates; empty on one rank, whose candidates the gradient has."""
    return whole if batch.world_size > 1 else whole.new_empty(0)


def _fake_contrast(*flat: Any) -> tuple[Tensor, ...]:
    blocks, _, settings, batch = TiledLossArguments.restored(flat)
    (rows, size), scale = blocks.anchors.shape, blocks.scale
    kept = blocks.anchors.new_empty((batch.total, size) if batch.world_size > 1 else (0,))
    return torch.empty_like(scale), scale.new_empty(rows * (1 + settings.symmetric), 3), kept


@_operator
def _contrast_gradient(
    weight: Tensor, statistics: Tensor, whole: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of the loss times its weight: anchors, candidates, scale, bias.

    The losses of other ranks reach this rank's features with the weights that they have there.
    """
    given = TiledLossArguments.restored(flat)
    with _on_device(given.blocks.anchors):
        backend, loss = _taken(given)
        columns = weight.new_empty(0)
        if _columns_too(loss) and loss.batch.world_size > 1:
            statistics = torch.cat([statistics, weight.expand(len(statistics), 1)], dim=1)
            columns = loss.batch.gather(statistics[len(statistics) - loss.batch.size :])
        kept = statistics, weight, columns, whole
        return _of_rank(backend, _contrast_gradients(*kept, *loss.flat()), loss, given)


def _columns_too(loss: TiledLossArguments) -> bool:
    """Return whether columns are anchors: those of all ranks are if there are no candidates."""
    return loss.settings.symmetric or loss.blocks.candidates is None


def _all_candidates(kept: Tensor, loss: TiledLossArguments) -> Tensor:
    """Return the candidates of all ranks, from what `_kept` returned."""
    return kept if loss.batch.world_size > 1 else loss.blocks.piece


@_part
def _contrast_gradients(
    statistics: Tensor, weight: Tensor, columns: Tensor, kept: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    """Return the gradients by this rank's logits.

    Args:
        statistics: Of this rank's lines, [lines, 3].
        weight: Of this rank's losses, 0-dim.
        columns: Statistics and weights of the columns of all ranks, [m, 4]; those of this rank's
            lines have their weights as well then. Empty if its lines are all.
        kept: From `_kept`.
        *flat: The arguments.
    """
    loss = TiledLossArguments.restored(flat)
    if len(columns):
        lines = torch.cat([statistics[: loss.batch.size], columns])
        statistics, weight = lines[:, :3], lines[:, 3]
    gradients = _backend(loss.blocks).contrast_gradients(
        loss.blocks,
        loss.entries,
        statistics,
        weight,
        columns=_columns_too(loss),
        whole=_all_candidates(kept, loss),
        rows=loss.settings.rows,
    )
    return _without_none(gradients)


def _without_none(gradients: BlockGradients) -> tuple[Tensor, ...]:
    """Return gradients as an operator does."""
    anchors, candidates, scale, bias = gradients
    return anchors, anchors.new_empty(0) if candidates is None else candidates, scale, bias


def _of_rank(
    backend: Any, found: tuple[Tensor, ...], loss: TiledLossArguments, given: TiledLossArguments
) -> tuple[Tensor, ...]:
    """Return the gradients for the features of this rank, in the features' dtype.

    Args:
        backend: The module that computes the blocks.
        found: The gradients by this rank's logits.
        loss: The arguments in the form that the module takes.
        given: The arguments as they are.
    """
    anchors, candidates, scale, bias = found
    dtype = given.blocks.anchors.dtype
    if loss.blocks.candidates is None:
        return anchors.to(dtype), candidates.to(dtype), scale / 2, bias
    candidates = backend.finished(loss.batch.scatter(candidates), loss.blocks.piece, loss.blocks)
    return anchors.to(dtype), candidates.to(dtype), scale, bias


@_operator
def _sigmoid_contrast(*flat: Any) -> tuple[Tensor, ...]:
    """Return the summed loss and its gradients by this rank's logits.

    They do not wait for sums of lines, so both come from one product.
    """
    given = TiledLossArguments.restored(flat)
    with _on_device(given.blocks.anchors):
        loss = _taken(given)[1]
        return _sigmoid_gradients(_gathered(loss), *loss.flat())


@_part
def _sigmoid_gradients(whole: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    blocks, entries, settings, _ = TiledLossArguments.restored(flat)
    backend = _backend(blocks)
    total, gradients = backend.sigmoid_gradients(blocks, entries, whole=whole, settings=settings)
    return total, *_without_none(gradients)


def _fake_sigmoid_contrast(*flat: Any) -> tuple[Tensor, ...]:
    loss = TiledLossArguments.restored(flat)
    scale, (rows, size) = loss.blocks.scale, loss.blocks.anchors.shape
    total, of_scale, of_bias = (torch.empty_like(scale) for _ in range(3))
    of_sides = scale.new_empty(rows, size), scale.new_empty(loss.columns, size)
    return total, *of_sides, of_scale, of_bias


def _sigmoid_contrast_gradient(
    weight: Tensor, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    """Return `weight` times the gradients of the summed loss: anchors, candidates, scale, bias."""
    given = TiledLossArguments.restored(flat)
    with _on_device(given.blocks.anchors):
        backend, loss = _taken(given)
        anchors = backend.finished(rows * weight, loss.blocks.anchors, loss.blocks)
        found = anchors, columns * weight, scale * weight, bias * weight
        return _of_rank(backend, found, loss, given)


def _fake_gradients(weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return empty gradients; the flat arguments are the last ones of either operator."""
    anchors, candidates = TiledLossArguments.restored(arguments[-_COUNT:]).blocks[:2]
    others = anchors.new_empty(0) if candidates is None else torch.empty_like(candidates)
    return (torch.empty_like(anchors), others, torch.empty_like(weight), torch.empty_like(weight))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save an operator's arguments, and its results besides the loss."""
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *output[1:])
    ctx.plain = [None if isinstance(x, Tensor) else x for x in inputs]


def _differentiate(operator: Any, ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients for an operator's arguments, from the operator of its gradient."""
    count = len(ctx.plain)
    saved = ctx.saved_tensors  # read once: activation checkpointing gives them once
    tensors, statistics = saved[:count], saved[count:]
    flat = tuple(
        plain if tensor is None else tensor
        for tensor, plain in zip(tensors, ctx.plain, strict=True)
    )
    anchors, candidates, scale, bias = operator(weights[0], *statistics, *flat)
    blocks = TiledLossArguments.restored(flat).blocks
    return (
        anchors,
        None if blocks.candidates is None else candidates,
        scale,
        None if blocks.bias is None else bias,
        *[None] * (count - 4),
    )


def _registered(function: Any, fake: Any, gradient: Any, outputs: int) -> Any:
    """Return the custom operator of a function, with an operator of its gradient.

    Args:
        function: Returns the loss, and tensors that its gradient needs.
        fake: Returns empty tensors of the same shapes.
        gradient: The function of the gradient.
        outputs: The number of tensors that the function returns.
    """
    # A compiled loss is not replayed: torch.compile has a mode that does so.
    function, gradient = (inspect.unwrap(one) for one in (function, gradient))
    saved = ", ".join(f"Tensor saved{place}" for place in range(outputs - 1))
    gradient = torch.library.custom_op(
        f"diptych::{gradient.__name__.lstrip('_')}",
        gradient,
        mutates_args=(),
        schema=f"(Tensor weight, {saved}, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    )
    gradient.register_fake(_fake_gradients)
    operator = torch.library.custom_op(
        f"diptych::{function.__name__.lstrip('_')}",
        function,
        mutates_args=(),
        schema=f"({_ARGUMENTS}) -> ({', '.join(['Tensor'] * outputs)})",
    )
    operator.register_fake(fake)
    operator.register_autograd(functools.partial(_differentiate, gradient), setup_context=_keep)
    return operator


_OPERATORS = {
    _contrast: _registered(_contrast, _fake_contrast, _contrast_gradient, 3),
    _sigmoid_contrast: _registered(
        _sigmoid_contrast, _fake_sigmoid_contrast, _sigmoid_contrast_gradient, 5
    ),
}
