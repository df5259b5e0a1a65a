"""Whole matrices of logits from half-precision features, on an accelerator's matrix units.

Features in bfloat16 or float16 are multiplied as such and summed in float32; the logits are
float32. The gradient of the logits is rounded to bfloat16, which has float32's range. As in
`operators`, `half_logits` and its gradient are custom operators, which `torch.compile` keeps whole
and which are differentiable once.
"""

from typing import Any

import torch
from torch import Tensor

_FEATURES = "Tensor anchors, Tensor candidates, Tensor scale, bool normalize"


@torch.library.custom_op("diptych::half_logits", mutates_args=(), schema=f"({_FEATURES}) -> Tensor")
def half_logits(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    normalize: bool,  # noqa: FBT001 - an operator's arguments are positional
) -> Tensor:
    """Return scale * anchors @ candidates.T, float32 [n, m].

    Args:
        anchors: [n, D], bfloat16 or float16, if `kernels_take` returns True for them.
        candidates: [m, D], likewise.
        scale: 0-dim, float32.
        normalize: Whether to divide the features by their norms.
    """
    with torch.autocast(anchors.device.type, enabled=False), torch.cuda.device(anchors.device):
        left, right = _prepared(anchors, candidates, normalize=normalize)
        return torch.mm(left, right.T, out_dtype=torch.float32).mul_(scale)


@half_logits.register_fake
def _(anchors: Tensor, candidates: Tensor, scale: Tensor, _: bool) -> Tensor:  # noqa: FBT001
    return scale.new_empty(anchors.shape[0], candidates.shape[0])


@torch.library.custom_op(
    "diptych::half_logits_gradient",
    mutates_args=(),
    schema=f"(Tensor gradient, {_FEATURES}) -> (Tensor, Tensor, Tensor)",
)
def half_logits_gradient(
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


@half_logits_gradient.register_fake
def _(gradient: Tensor, anchors: Tensor, candidates: Tensor, *_: Any) -> tuple[Tensor, ...]:
    sides = anchors.new_empty(anchors.shape), candidates.new_empty(candidates.shape)
    return (*sides, gradient.new_empty((), dtype=torch.float32))


def _prepared(anchors: Tensor, candidates: Tensor, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return contiguous features, divided by their norms if `normalize`."""
    anchors, candidates = anchors.contiguous(), candidates.contiguous()
    if not normalize:
        return anchors, candidates
    from diptych.losses.base.tiles import triton_blocks  # noqa: PLC0415

    return triton_blocks.normalize_features(anchors), triton_blocks.normalize_features(candidates)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*half_logits_gradient(gradient, *ctx.saved_tensors, ctx.normalize), None)


half_logits.register_autograd(_differentiate, setup_context=_keep)
