"""Whole matrices of logits from half-precision features, on an accelerator's matrix units.

Features in bfloat16 or float16 are multiplied as such and summed in float32; the logits are
float32. The gradient of the logits is rounded to bfloat16, which has float32's range. As in
`operators`, `torch.compile` sees a custom operator, and the gradient is not differentiable.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from diptych.losses.base.tiles.operators import EagerOperator

_FEATURES = "Tensor anchors, Tensor candidates, Tensor scale, bool normalize"


def half_logits(anchors: Tensor, candidates: Tensor, scale: Tensor, *, normalize: bool) -> Tensor:
    """Return scale * anchors @ candidates.T, float32 [n, m].

    Args:
        anchors: [n, D], bfloat16 or float16, if `kernels_take` returns True for them.
        candidates: [m, D], likewise.
        scale: 0-dim, float32.
        normalize: Whether to divide the features by their norms.
    """
    inputs = anchors, candidates, scale, normalize
    logits: Tensor
    if torch.compiler.is_compiling():
        logits = _operator(*inputs)
    else:
        differentiate = partial(_differentiate, _gradients)
        logits = EagerOperator.apply(_logits, _keep, differentiate, *inputs)  # type: ignore[no-untyped-call]
    return logits


def _logits(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    normalize: bool,  # noqa: FBT001 - an operator's arguments are positional
) -> Tensor:
    """Return the logits; arguments as for `half_logits`."""
    with torch.autocast(anchors.device.type, enabled=False), torch.cuda.device(anchors.device):
        left, right = _prepared(anchors, candidates, normalize=normalize)
        return torch.mm(left, right.T, out_dtype=torch.float32).mul_(scale)


def _fake_logits(anchors: Tensor, candidates: Tensor, scale: Tensor, _: bool) -> Tensor:  # noqa: FBT001
    return scale.new_empty(anchors.shape[0], candidates.shape[0])


def _gradients(
    gradient: Tensor,
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    normalize: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients for anchors, candidates and scale from that of the logits, [n, m]."""
    from diptych.losses.base.tiles import triton_blocks  # noqa: PLC0415 - needs Triton

    with torch.autocast(anchors.device.type, enabled=False), torch.cuda.device(anchors.device):
        left, right = (
            side.to(torch.bfloat16) for side in _prepared(anchors, candidates, normalize=normalize)
        )
        gradient = gradient.to(torch.bfloat16)
        totals = [
            torch.mm(gradient, right, out_dtype=torch.float32),
            torch.mm(gradient.T, left, out_dtype=torch.float32),
        ]
        scale_gradient = (totals[0] * left).sum()
        gradients = [
            triton_blocks.feature_gradients(total, side.contiguous(), scale, normalize=normalize)
            for total, side in zip(totals, (anchors, candidates), strict=True)
        ]
    return gradients[0], gradients[1], scale_gradient


def _fake_gradients(
    gradient: Tensor, anchors: Tensor, candidates: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    sides = anchors.new_empty(anchors.shape), candidates.new_empty(candidates.shape)
    return (*sides, gradient.new_empty((), dtype=torch.float32))


def _prepared(anchors: Tensor, candidates: Tensor, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return contiguous features, divided by their norms if `normalize`."""
    anchors, candidates = anchors.contiguous(), candidates.contiguous()
    if not normalize:
        return anchors, candidates
    from diptych.losses.base.tiles import triton_blocks  # noqa: PLC0415

    left, right = triton_blocks.normalize_features(anchors, candidates)
    return left, right


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(operator: Any, ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*operator(gradient, *ctx.saved_tensors, ctx.normalize), None)


_operator = torch.library.custom_op(
    "diptych::half_logits", _logits, mutates_args=(), schema=f"({_FEATURES}) -> Tensor"
)
_operator.register_fake(_fake_logits)
_gradient_operator = torch.library.custom_op(
    "diptych::half_logits_gradient",
    _gradients,
    mutates_args=(),
    schema=f"(Tensor gradient, {_FEATURES}) -> (Tensor, Tensor, Tensor)",
)
_gradient_operator.register_fake(_fake_gradients)
_operator.register_autograd(partial(_differentiate, _gradient_operator), setup_context=_keep)
