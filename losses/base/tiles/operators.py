"""Operators: the tiled objectives as torch knows them, each with the operator of its gradient.

`torch.compile` keeps a custom operator whole. The gradient has no gradient of its own: a second
derivative raises.
"""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from diptych.losses.base.tiles import torch_blocks
from diptych.losses.base.tiles.torch_blocks import Entries, Gradients, Logits, losses
from diptych.losses.base.validation import HALF, working_dtype

_FEATURES = "Tensor anchors, Tensor candidates, Tensor scale"
_ENTRIES = "Tensor partner, Tensor? itself, Tensor? row_groups, Tensor? column_groups"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_runs_on(device: torch.device) -> bool:
    """Return whether the Triton kernels run there.

    They ask for tensor cores of bfloat16 (compute capability 8.0), and for tensor descriptors and
    float32 results of half products, which came with Triton 3.4 and the torch of that time.
    """
    return device.type == "cuda" and _has_triton(device)


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
    """Return whether the Triton kernels compute with such features [n, D], once in `dtype`."""
    return dtype in HALF and features.shape[1] % 8 == 0 and triton_runs_on(features.device)


def _backend(
    logits: tuple[Tensor, Tensor, Tensor], bias: Tensor | None = None, *, normalize: bool
) -> tuple[Any, Logits]:
    """Return the module whose functions compute the blocks, and what they compute them from."""
    anchors, candidates, scale = logits
    if kernels_take(anchors, anchors.dtype):
        from diptych.losses.base.tiles import triton_blocks  # noqa: PLC0415 - Triton is not everywhere

        sides = _aligned(anchors), _aligned(candidates)
        return triton_blocks, Logits(*sides, scale, bias, normalize)
    dtype = working_dtype(anchors)
    return torch_blocks, Logits(anchors.to(dtype), candidates.to(dtype), scale, bias)


def _aligned(features: Tensor) -> Tensor:
    """Return features as a tensor descriptor wants them: contiguous, at a multiple of 16 bytes."""
    features = features.contiguous()
    return features if features.data_ptr() % 16 == 0 else features.clone()


def _like(gradients: Gradients, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients with those of the features in the features' dtype."""
    anchors, candidates, scale, bias = gradients
    return anchors.to(features.dtype), candidates.to(features.dtype), scale, bias


@torch.library.custom_op(
    "diptych::contrast",
    mutates_args=(),
    schema=f"({_FEATURES}, {_ENTRIES}, bool group_matches, Tensor valid, bool decoupled,"
    " float smoothing, bool symmetric, bool normalize, int rows) -> (Tensor, Tensor, Tensor)",
)
def contrast(  # noqa: PLR0917 - an operator's arguments are positional
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    partner: Tensor,
    itself: Tensor | None,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    group_matches: bool,  # noqa: FBT001
    valid: Tensor,
    decoupled: bool,  # noqa: FBT001
    smoothing: float,
    symmetric: bool,  # noqa: FBT001
    normalize: bool,  # noqa: FBT001
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss, and the statistics of rows [3, n] and columns ([3, m] or [3, 0])."""
    entries = Entries(partner, itself, row_groups, column_groups, group_matches)
    with torch.autocast(anchors.device.type, enabled=False):
        backend, logits = _backend((anchors, candidates, scale), normalize=normalize)
        sums = backend.contrast_sums(logits, entries, symmetric=symmetric, rows=rows)
        total, statistics = scale.new_zeros(()), []
        for one in sums[: 1 + symmetric]:
            loss, kept = losses(one, valid, decoupled=decoupled, smoothing=smoothing)
            total += loss
            statistics.append(kept)
    if not symmetric:
        statistics.append(scale.new_empty(3, 0))
    return total, statistics[0], statistics[1]


@contrast.register_fake
def _(
    anchors: Tensor, candidates: Tensor, scale: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    symmetric = settings[-3]
    columns = candidates.shape[0] if symmetric else 0
    return (scale.new_empty(()), scale.new_empty(3, anchors.shape[0]), scale.new_empty(3, columns))


@torch.library.custom_op(
    "diptych::contrast_gradient",
    mutates_args=(),
    schema=f"(Tensor weight, {_FEATURES}, {_ENTRIES}, bool group_matches, Tensor row_statistics,"
    " Tensor column_statistics, bool normalize, int rows) -> (Tensor, Tensor, Tensor)",
)
def contrast_gradient(  # noqa: PLR0917
    weight: Tensor,
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    partner: Tensor,
    itself: Tensor | None,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    group_matches: bool,  # noqa: FBT001
    row_statistics: Tensor,
    column_statistics: Tensor,
    normalize: bool,  # noqa: FBT001
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `weight` times the gradients of the summed loss for anchors, candidates and scale."""
    entries = Entries(partner, itself, row_groups, column_groups, group_matches)
    with torch.autocast(anchors.device.type, enabled=False):
        backend, logits = _backend((anchors, candidates, scale), normalize=normalize)
        gradients = backend.contrast_gradients(
            logits,
            entries,
            row_statistics,
            column_statistics if column_statistics.shape[1] else None,
            weight=weight,
            rows=rows,
        )
    return _like(gradients, anchors)[:3]


@contrast_gradient.register_fake
def _(weight: Tensor, anchors: Tensor, candidates: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(anchors), torch.empty_like(candidates), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *features, partner, itself, row_groups, column_groups, group_matches = inputs[:8]
    ctx.save_for_backward(*features, partner, itself, row_groups, column_groups, *output[1:])
    ctx.group_matches, ctx.settings = group_matches, inputs[-2:]


def _differentiate(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, row_statistics, column_statistics = ctx.saved_tensors
    gradients = contrast_gradient(
        weights[0], *inputs, ctx.group_matches, row_statistics, column_statistics, *ctx.settings
    )
    return (*gradients, *[None] * 11)


contrast.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op(
    "diptych::sigmoid_contrast",
    mutates_args=(),
    schema=f"({_FEATURES}, Tensor bias, {_ENTRIES}, bool normalize, int rows) -> Tensor",
)
def sigmoid_contrast(  # noqa: PLR0917
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    bias: Tensor,
    partner: Tensor,
    itself: Tensor | None,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    normalize: bool,  # noqa: FBT001
    rows: int,
) -> Tensor:
    """Return the summed loss."""
    entries = Entries(partner, itself, row_groups, column_groups, group_matches=True)
    with torch.autocast(anchors.device.type, enabled=False):
        backend, logits = _backend((anchors, candidates, scale), bias, normalize=normalize)
        total: Tensor = backend.sigmoid_sum(logits, entries, rows=rows)
    return total


@sigmoid_contrast.register_fake
def _(*inputs: Any) -> Tensor:
    scale: Tensor = inputs[2]
    return scale.new_empty(())


@torch.library.custom_op(
    "diptych::sigmoid_contrast_gradient",
    mutates_args=(),
    schema=f"(Tensor weight, {_FEATURES}, Tensor bias, {_ENTRIES}, bool normalize,"
    " int rows) -> (Tensor, Tensor, Tensor, Tensor)",
)
def sigmoid_contrast_gradient(  # noqa: PLR0917
    weight: Tensor,
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    bias: Tensor,
    partner: Tensor,
    itself: Tensor | None,
    row_groups: Tensor | None,
    column_groups: Tensor | None,
    normalize: bool,  # noqa: FBT001
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `weight` times the gradients for anchors, candidates, scale and bias."""
    entries = Entries(partner, itself, row_groups, column_groups, group_matches=True)
    with torch.autocast(anchors.device.type, enabled=False):
        backend, logits = _backend((anchors, candidates, scale), bias, normalize=normalize)
        gradients = backend.sigmoid_gradients(logits, entries, weight=weight, rows=rows)
    return _like(gradients, anchors)


@sigmoid_contrast_gradient.register_fake
def _(weight: Tensor, anchors: Tensor, candidates: Tensor, *_: Any) -> tuple[Tensor, ...]:
    scalar = torch.empty_like(weight)
    return torch.empty_like(anchors), torch.empty_like(candidates), scalar, scalar.clone()


def _keep_sigmoid(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.normalize, ctx.rows = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_sigmoid(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
    settings = ctx.normalize, ctx.rows
    gradients = sigmoid_contrast_gradient(weight, *ctx.saved_tensors, *settings)
    return (*gradients, *[None] * 6)


sigmoid_contrast.register_autograd(_differentiate_sigmoid, setup_context=_keep_sigmoid)
