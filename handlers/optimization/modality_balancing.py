"""Gradient balancing between two components of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine.checks import whole_number
from diptych.engine.events import StepEvents
from diptych.engine.handler import Change, Handler
from diptych.engine.trainer import Trainer
from diptych.handlers.argument_checks import number, positive, share_below_one
from diptych.handlers.before_step import BeforeStep
from diptych.handlers.components import Components, find_components
from diptych.handlers.optimization.gradient_clipping import GradientClipping
from diptych.handlers.optimization.gradient_norms import norm_of, scalable, shared_norms


def _check_components(_: Any, __: attrs.Attribute[Any], components: Any) -> None:
    if isinstance(components, str) or len(components) != 2:
        raise ValueError(f"components must be two, got {components!r}")


@attrs.define(kw_only=True, eq=False)
class ModalityBalancing(Handler):
    """Scales up the gradients of the weaker of two components, towards a ratio of their norms.

    Let g1 and g2 be the norms of the two components' gradients, and d the running mean of
    log(g1 / g2), in which each iteration weighs `smoothing` times the next. The scales are

        s1 = min(max(ratio / exp(d), 1), max_scale),  s2 = min(max(exp(d) / ratio, 1), max_scale).

    One of them is 1: the gradients of the stronger component never change. The handler scales
    gradients, not learning rates. An iteration in which a norm is 0, missing or not finite does not
    enter the mean. In the first `warmup` iterations the mean is collected and nothing is scaled.

    Published each iteration: `balancing/ratio`, which is exp(d) before scaling, and
    `balancing/scale/<component>`.

    An optimizer that divides by the size of past gradients (Adam and its variants) cancels a
    constant scale. With it, balancing only affects how the components share a clipped norm, and the
    iterations in which the scale changes. With SGD a scale acts like a learning rate.

    Event: `StepEvents.GRADIENTS_READY`. Attach it after `LossGuard`, before `GradientClipping`.
    Cost: one pass over the gradients for the norms, one over the two components to scale them, and
        a dozen operations on scalars; no synchronisation and no collective, because gradients are
        averaged over ranks already and all ranks compute the same scales. With a sharded model, one
        all-reduce of one number per parameter.

    Args:
        components: names of two components, or a mapping of two names to paths; see `Components`.
        ratio: target ratio of the first component's norm to the second's, > 0.
        max_scale: the largest scale, >= 1.
        smoothing: weight of an iteration relative to the next, in [0, 1); 0: no memory.
        warmup: iterations without scaling.

    Raises:
        ValueError: if an argument is out of range; when attached, if a component has no parameter,
            the components share a parameter, or a `GradientClipping` is attached before.
    """

    changes: ClassVar[frozenset[Change]] = frozenset({Change.GRADIENTS})
    collective: ClassVar[bool] = True

    components: Components = attrs.field(default=("image", "text"), validator=_check_components)
    ratio: float = attrs.field(default=1.0, validator=positive)
    max_scale: float = attrs.field(
        default=4.0, validator=number("be >= 1 and finite", lambda value: 1 <= value < math.inf)
    )
    smoothing: float = attrs.field(default=0.95, validator=share_below_one)
    warmup: int = attrs.field(default=200, validator=whole_number(0, of="iterations"))
    _members: dict[str, set[int]] = attrs.field(factory=dict, init=False, repr=False)
    # Weighted sum and sum of weights, so that the mean is not biased towards 0 at the start.
    _sum: Tensor = attrs.field(factory=lambda: torch.zeros(()), init=False, repr=False)
    _weight: Tensor = attrs.field(factory=lambda: torch.zeros(()), init=False, repr=False)
    _before: BeforeStep[tuple[Tensor, Tensor]] = attrs.field(
        factory=BeforeStep, init=False, repr=False
    )

    def attach(self, trainer: Trainer) -> None:
        """Balance the trainer's gradients as soon as they are ready."""
        if trainer.handlers_of(GradientClipping):
            raise ValueError(
                "ModalityBalancing must be attached before GradientClipping, got it after: scaled "
                "gradients would exceed the bound. Attach it first"
            )
        self._find(trainer)
        shared_norms(trainer).attach(trainer)
        self._sum, self._weight = self._sum.to(trainer.device), self._weight.to(trainer.device)
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, self._balance)

    @property
    def role(self) -> str:
        """The names of the components."""
        return ", ".join(self.components)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running mean: its weighted sum and the sum of weights."""
        return {"sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Continue from a mean that `state_dict` returned."""
        device = self._sum.device
        self._before.forget()
        self._sum, self._weight = state_dict["sum"].to(device), state_dict["weight"].to(device)

    def _start(self, trainer: Trainer) -> None:
        self._find(trainer)
        if trainer.state.iteration == 0:
            self._before.forget()
            self._sum, self._weight = torch.zeros_like(self._sum), torch.zeros_like(self._weight)

    def _find(self, trainer: Trainer) -> None:
        self._members = find_components(trainer.model, trainer.loss, self.components)
        first, second = self._members.values()
        if first & second:
            raise ValueError(
                f"components must share no parameter, got {len(first & second)} that belong to "
                f"both {' and '.join(self._members)}. Give narrower paths"
            )

    def _balance(self, trainer: Trainer) -> None:
        shared = shared_norms(trainer)
        measured = shared.measure_again(trainer)
        self._sum, self._weight = self._before.of(trainer, (self._sum, self._weight))
        gradients: list[list[Tensor]] = []
        norms = []
        for members in self._members.values():
            indices = [i for i, p in enumerate(measured.parameters) if id(p) in members]
            gradients.append(scalable([measured.parameters[i] for i in indices]))
            norms.append(norm_of([measured.norms[i] for i in indices], trainer.device))
        scales = self._scales(*norms)
        if trainer.state.iteration <= self.warmup:
            scales = torch.ones_like(scales)
        else:
            for part, scale in zip(gradients, scales.unbind(), strict=True):
                if part:
                    torch._foreach_mul_(part, scale)
            shared.invalidate()
        self._publish(trainer, scales)

    def _scales(self, first: Tensor, second: Tensor) -> Tensor:
        """Add the norms of an iteration to the mean; return both scales [2]."""
        difference = (first.log() - second.log()).to(self._sum.dtype)
        usable = difference.isfinite()
        kept = torch.where(usable, self.smoothing, 1.0)
        self._sum = kept * self._sum + torch.where(usable, difference, 0.0)
        self._weight = kept * self._weight + usable
        excess = self._mean() - math.log(self.ratio)
        return torch.stack([-excess, excess]).clamp(0.0, math.log(self.max_scale)).exp()

    def _mean(self) -> Tensor:
        # Without a usable iteration, the target: nothing is scaled.
        return torch.where(self._weight > 0, self._sum / self._weight, math.log(self.ratio))

    def _publish(self, trainer: Trainer, scales: Tensor) -> None:
        scalars = {"balancing/ratio": self._mean().exp()}
        for name, scale in zip(self._members, scales.unbind(), strict=True):
            scalars[f"balancing/scale/{name}"] = scale
        trainer.metrics.update(scalars)
