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
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diptych.losses.base.gather import GlobalBatch
from diptych.losses.base.tiles import torch_blocks
from diptych.losses.base.tiles.torch_blocks import (
    BlockGradients,
    Entries,
    LossBlocks,
    TileSettings,
)
from diptych.losses.base.validation import HALF, working_dtype

_ARGUMENTS = (
    "Tensor anchors, Tensor? candidates, Tensor scale, Tensor? bias, bool normalize,"
    " Tensor partner, Tensor? inverse, Tensor? itself, Tensor? row_groups, Tensor? column_groups,"
    " bool group_matches, Tensor? valid,"
    " int rows, bool decoupled, float smoothing, bool symmetric,"
    " int[] sizes, int rank"
)
_COUNT = _ARGUMENTS.count(",") + 1


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
            TileSettings(*flat[12:16]),
            GlobalBatch(tuple(flat[16]), flat[17]),
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
    device = features.device
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.autocast(device.type, enabled=False), guard:
        yield


def _backend(blocks: LossBlocks) -> tuple[Any, LossBlocks]:
    """Return the module that computes the blocks, and the blocks in the form that it takes."""
    anchors, candidates, scale, bias, normalize = blocks
    backend: Any
    convert: Any
    if kernels_take(anchors, anchors.dtype):
        from diptych.losses.base.tiles import triton_blocks  # noqa: PLC0415 - needs Triton

        backend, convert = triton_blocks, _aligned
    else:
        backend, convert = torch_blocks, functools.partial(Tensor.to, dtype=working_dtype(anchors))
        normalize = False
    candidates = None if candidates is None else convert(candidates)
    return backend, LossBlocks(convert(anchors), candidates, scale, bias, normalize)


def _started(
    given: LossBlocks, entries: Entries, batch: GlobalBatch
) -> tuple[Any, LossBlocks, Tensor, Tensor]:
    """Return the module that computes the blocks, the blocks, all candidates, the description.

    Candidates are normalised before they are gathered.
    """
    backend, blocks = _backend(given)
    unit = blocks.normalize
    if unit:
        blocks = backend.at_norm(blocks)
    with torch.no_grad():
        whole = batch.gather(blocks.piece)
    return backend, blocks, whole, backend.described(blocks, entries, whole, unit=unit)


def _aligned(features: Tensor) -> Tensor:
    """Return features as a tensor descriptor needs them: contiguous, at a multiple of 16 bytes."""
    features = features.contiguous()
    return features if features.data_ptr() % 16 == 0 else features.clone()


def _as_features(gradients: BlockGradients, features: Tensor) -> tuple[Tensor, ...]:
    """Return gradients, those of anchors and candidates in the features' dtype."""
    anchors, candidates, scale, bias = gradients
    candidates = anchors.new_empty(0) if candidates is None else candidates
    return anchors.to(features.dtype), candidates.to(features.dtype), scale, bias


def _contrast(*flat: Any) -> tuple[Tensor, ...]:
    """Return the summed loss and what its gradient needs.

    These are the description, the statistics [lines, 3], and over several ranks all candidates
    [m, D].
    """
    given, entries, settings, batch = TiledLossArguments.restored(flat)
    with _on_device(given.anchors):
        backend, blocks, whole, described = _started(given, entries, batch)
        sums = backend.contrast_sums(
            blocks,
            entries,
            whole=whole,
            batch=batch,
            described=described,
            symmetric=settings.symmetric,
            rows=settings.rows,
        )
        total, statistics = backend.losses_of_sums(sums, entries, settings)
    return total, described, statistics, _kept(whole, batch)


def _kept(whole: Tensor, batch: GlobalBatch) -> Tensor:
    """Return the gathered candidates; empty on one rank, whose candidates the gradient has."""
    return whole if batch.world_size > 1 else whole.new_empty(0)


def _fake_contrast(*flat: Any) -> tuple[Tensor, ...]:
    total, described, kept = _fake_sigmoid_contrast(*flat)
    blocks, _, settings, _ = TiledLossArguments.restored(flat)
    lines = blocks.anchors.shape[0] * (1 + settings.symmetric)
    return total, described, total.new_empty(lines, 3), kept


def _contrast_gradient(
    weight: Tensor, described: Tensor, statistics: Tensor, whole: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of the loss times its weight: anchors, candidates, scale, bias.

    The losses of other ranks reach this rank's features with the weights that they have there.
    """
    given, entries, settings, batch = TiledLossArguments.restored(flat)
    # The anchors of all ranks, if there are no candidates, are the columns.
    columns = settings.symmetric or given.candidates is None
    with _on_device(given.anchors):
        backend, blocks = _backend(given)
        weights = weight
        if columns and batch.world_size > 1:
            statistics, weights = _of_all_lines(statistics, weight, batch)
        gradients = backend.contrast_gradients(
            blocks,
            entries,
            statistics,
            weights,
            described=described,
            columns=columns,
            whole=whole if batch.world_size > 1 else blocks.piece,
            batch=batch,
            rows=settings.rows,
        )
    return _as_features(gradients, given.anchors)


def _of_all_lines(statistics: Tensor, weight: Tensor, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
    """Return the statistics [n + m, 3] and weights of this rank's rows and all ranks' columns."""
    own = torch.cat([statistics, weight.expand(len(statistics), 1)], dim=1)
    lines = torch.cat([own[: batch.size], batch.gather(own[len(own) - batch.size :])])
    return lines[:, :3], lines[:, 3]


def _sigmoid_contrast(*flat: Any) -> tuple[Tensor, ...]:
    """Return the summed loss, the description and, over several ranks, all candidates [m, D]."""
    given, entries, settings, batch = TiledLossArguments.restored(flat)
    with _on_device(given.anchors):
        backend, blocks, whole, described = _started(given, entries, batch)
        total: Tensor = backend.sigmoid_sum(
            blocks, entries, whole=whole, described=described, rows=settings.rows
        )
    return total, described, _kept(whole, batch)


def _fake_sigmoid_contrast(*flat: Any) -> tuple[Tensor, ...]:
    blocks, _, _, batch = TiledLossArguments.restored(flat)
    anchors, size = blocks.anchors, 0
    if kernels_take(anchors, anchors.dtype):
        from diptych.losses.base.tiles import triton_blocks  # noqa: PLC0415 - needs Triton

        size = triton_blocks.description_size(anchors.shape[0])
    kept = (batch.total, anchors.shape[1]) if batch.world_size > 1 else (0,)
    described = anchors.new_empty(size, dtype=torch.int32)
    return blocks.scale.new_empty(()), described, anchors.new_empty(kept)


def _sigmoid_contrast_gradient(
    weight: Tensor, described: Tensor, whole: Tensor, *flat: Any
) -> tuple[Tensor, ...]:
    """Return `weight` times the gradients of the summed loss: anchors, candidates, scale, bias."""
    given, entries, settings, batch = TiledLossArguments.restored(flat)
    with _on_device(given.anchors):
        backend, blocks = _backend(given)
        gradients = backend.sigmoid_gradients(
            blocks,
            entries,
            whole=whole if batch.world_size > 1 else blocks.piece,
            described=described,
            batch=batch,
            weight=weight,
            rows=settings.rows,
        )
    return _as_features(gradients, given.anchors)


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
    tensors, statistics = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
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
    _contrast: _registered(_contrast, _fake_contrast, _contrast_gradient, 4),
    _sigmoid_contrast: _registered(
        _sigmoid_contrast, _fake_sigmoid_contrast, _sigmoid_contrast_gradient, 3
    ),
}
