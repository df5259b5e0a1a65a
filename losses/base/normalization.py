"""L2 normalisation of features, with a zero gradient for vectors that have no direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diptych.losses.base.validation import working_dtype


def normalize(features: Tensor, epsilon: float = 1e-12) -> Tensor:
    """Return features divided by their L2 norm along the last dimension.

    A vector whose norm is at most `epsilon` has no direction: it becomes zero and gets a zero
    gradient, while `F.normalize` would multiply its gradient by 1 / epsilon.
    """
    unit: Tensor = _Normalize.apply(features, epsilon)  # type: ignore[no-untyped-call]
    return unit


def normalize_in_float32(features: Tensor) -> Tensor:
    """Return features at unit norm in float32, or in float64 if they are float64."""
    return normalize(features.to(working_dtype(features)))


class _Normalize(torch.autograd.Function):
    """`normalize`; its backward keeps one copy of the features, autograd's own would keep four."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, epsilon: float) -> Tensor:
        unit = features / _divisor(features, epsilon)
        ctx.save_for_backward(features, unit)
        ctx.epsilon = epsilon
        return unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        features, unit = ctx.saved_tensors
        norm = _divisor(features, ctx.epsilon)
        along = torch.linalg.vecdot(gradients[0], unit)[..., None]
        across = torch.addcmul(gradients[0], along, unit, value=-1)
        # A second derivative needs `across`; without one it is overwritten.
        return across / norm if torch.is_grad_enabled() else across.div_(norm), None


def _divisor(features: Tensor, epsilon: float) -> Tensor:
    """Return the norm of each vector with its dimension kept; infinite if it is at most epsilon."""
    norm: Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return norm.masked_fill(norm <= epsilon, torch.inf)
