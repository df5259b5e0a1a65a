"""What happens to gradients between the backward pass and the update."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import attrs
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_

from diptych.engine.distributed.dtensor import mixed
from diptych.engine.events import StepEvents
from diptych.engine.trainer import Trainer
from diptych.handlers.optimization.gradient_norms import shared_norms


def _check_bound(_: Any, attribute: attrs.Attribute[float], value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{attribute.name} must be > 0 and finite, got {value!r}")


@attrs.define(kw_only=True, eq=False)
class GradientClipping:
    """Bounds the gradients: their norm, their largest entry, or both.

    The norm is the L2 norm of the gradients of all parameters that the optimizer holds, the loss's
    included, unscaled and averaged over ranks. Where it exceeds `max_norm`, all gradients are
    scaled to it; then every entry is cut to [-max_value, max_value]. `gradients/norm` is the
    norm before both, published each iteration.

    Event: `StepEvents.GRADIENTS_READY`.
    Cost: one pass over the gradients for the norm and one for each bound; no synchronisation. Of a
        sharded model one all-reduce, of a number for each parameter.

    Args:
        max_norm: > 0; None leaves the norm.
        max_value: > 0; None leaves the entries.

    Raises:
        ValueError: if neither is given, or one is not positive.
    """

    changes: ClassVar[tuple[str, ...]] = ("gradients",)

    max_norm: float | None = attrs.field(
        default=None, validator=attrs.validators.optional(_check_bound)
    )
    max_value: float | None = attrs.field(
        default=None, validator=attrs.validators.optional(_check_bound)
    )

    def __attrs_post_init__(self) -> None:
        if self.max_norm is None and self.max_value is None:
            raise ValueError("GradientClipping needs max_norm, max_value or both, got neither")

    def attach(self, trainer: Trainer) -> None:
        """Clip when the trainer's gradients are ready."""
        shared_norms(trainer)
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, self._clip)

    def _clip(self, trainer: Trainer) -> None:
        measured = shared_norms(trainer).measure_anew(trainer)
        if not measured.parameters:  # a handler before this one took them away
            return
        trainer.metrics.update({"gradients/norm": measured.total})
        with mixed(trainer.model):
            if self.max_norm is not None:
                clip_grads_with_norm_(measured.parameters, self.max_norm, measured.total)
            if self.max_value is not None:
                clip_grad_value_(measured.parameters, self.max_value)
