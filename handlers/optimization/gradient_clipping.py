"""Gradient clipping by norm and by value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from diptych.engine.events import StepEvents
from diptych.engine.handler import Change, Handler
from diptych.engine.trainer import Trainer
from diptych.handlers.argument_checks import positive
from diptych.handlers.optimization.gradient_norms import scalable, shared_norms

EPSILON = 1e-6
"""Added to a norm that divides, as in torch's `clip_grad_norm_`."""


@attrs.define(kw_only=True, eq=False)
class GradientClipping(Handler):
    """Clips the gradients by their norm, by value, or both.

    The norm is the L2 norm of the gradients of all parameters that the trainer's optimizers hold,
    those of the loss included, unscaled and averaged over ranks. If it exceeds `max_norm`, all
    gradients are scaled down to it; then every entry is clamped to [-max_value, max_value]. The
    norm before clipping is published each iteration as `gradients/norm`.

    Event: `StepEvents.GRADIENTS_READY`.
    Cost: one pass over the gradients for the norm and one for each bound; no synchronisation. With
        a sharded model, one all-reduce of one number per parameter.

    Args:
        max_norm: largest norm, > 0; None: no clipping by norm.
        max_value: largest absolute value of an entry, > 0; None: no clipping by value.

    Raises:
        ValueError: if neither is given, or one is not positive.
    """

    changes: ClassVar[frozenset[Change]] = frozenset({Change.GRADIENTS})
    collective: ClassVar[bool] = True

    max_norm: float | None = attrs.field(
        default=None, validator=attrs.validators.optional(positive)
    )
    max_value: float | None = attrs.field(
        default=None, validator=attrs.validators.optional(positive)
    )

    def __attrs_post_init__(self) -> None:
        if self.max_norm is None and self.max_value is None:
            raise ValueError("GradientClipping needs max_norm, max_value or both, got neither")

    def attach(self, trainer: Trainer) -> None:
        """Clip as soon as the trainer's gradients are ready."""
        shared_norms(trainer).attach(trainer)
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, self._clip)

    def _clip(self, trainer: Trainer) -> None:
        measured = shared_norms(trainer).measure_again(trainer)
        if not measured.parameters:  # an earlier handler has removed all gradients
            return
        trainer.metrics.update_uncopied({"gradients/norm": measured.total})
        if self.max_norm is not None:
            factor = (self.max_norm / (measured.total + EPSILON)).clamp(max=1.0)
            _scale(scalable(measured.parameters), factor)
        if self.max_value is not None:
            _clamp(measured.parameters, self.max_value)


def _clamp(parameters: Sequence[nn.Parameter], bound: float) -> None:
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # the bound is for sums of parts
    gradients = scalable(parameters)
    torch._foreach_clamp_min_(gradients, -bound)
    torch._foreach_clamp_max_(gradients, bound)


def _scale(parts: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors by a number: what `clip_grads_with_norm_` does in forty calls."""
    devices = {part.device for part in parts}
    for device in devices:
        alike = parts if len(devices) == 1 else [one for one in parts if one.device == device]
        torch._foreach_mul_(alike, factor.to(device))
