"""Keeps the gradients of two components of a model in proportion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine.checks import whole_number
from diptych.engine.distributed.dtensor import local_parts
from diptych.engine.events import StepEvents
from diptych.engine.trainer import Trainer
from diptych.handlers.components import Components, find_components
from diptych.handlers.optimization.gradient_clipping import GradientClipping
from diptych.handlers.optimization.gradient_norms import norm_of, shared_norms


def _check_components(_: Any, __: attrs.Attribute[Any], components: Any) -> None:
    if isinstance(components, str) or len(components) != 2:
        raise ValueError(f"components must be two, got {components!r}")


def _check_ratio(_: Any, attribute: attrs.Attribute[float], value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{attribute.name} must be > 0 and finite, got {value!r}")


def _check_scale(_: Any, __: attrs.Attribute[float], value: float) -> None:
    if not 1 <= value < math.inf:
        raise ValueError(f"max_scale must be >= 1 and finite, got {value!r}")


def _check_smoothing(_: Any, __: attrs.Attribute[float], value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"smoothing must lie in [0, 1), got {value!r}")


@attrs.define(kw_only=True, eq=False)
class ModalityBalancing:
    """Scales up the gradients of the weaker of two components, towards a ratio of their norms.

    With the norms g1 and g2 of the two components' gradients, averaged as d = mean(log(g1 / g2))
    over the iterations so far, each weighing `smoothing` times the next, the components' scales are

        s1 = min(max(ratio / exp(d), 1), max_scale),  s2 = min(max(exp(d) / ratio, 1), max_scale).

    One of them is 1: the stronger component is never touched. Gradients are scaled, not rates. An
    iteration in which a norm is 0, missing or not finite leaves the average alone. Before `warmup`
    iterations are done nothing is scaled, and the average is gathered already.

    Published each iteration: `balancing/ratio`, exp(d), as it is before scaling, and
    `balancing/scale/<component>`.

    An optimizer that divides by the size of past gradients (Adam and its kin) undoes a scale that
    stays the same; there balancing changes how the components share a clipped norm, and what they
    do while the scale moves. With SGD a scale acts like a rate.

    Event: `StepEvents.GRADIENTS_READY`. Attach it after `LossGuard`, before `GradientClipping`.
    Cost: one pass over the gradients for the norms and one over the two components to scale them,
        a dozen operations on scalars; no synchronisation, no collective: over ranks gradients are
        averaged already, and all ranks come to the same scales. Of a sharded model one all-reduce,
        of a number for each parameter.

    Args:
        components: names, or a mapping of names to paths, of two components; see `Components`.
        ratio: of the first component's norm to the second's, that is aimed at, > 0.
        max_scale: the largest scale, >= 1.
        smoothing: what an iteration weighs relative to the next, in [0, 1); 0: no memory.
        warmup: iterations without scaling.

    Raises:
        ValueError: if an argument is out of range; when attached, if a component has no
            parameters, both have a parameter in common, or gradients are clipped before.
    """

    changes: ClassVar[tuple[str, ...]] = ("gradients",)

    components: Components = attrs.field(default=("image", "text"), validator=_check_components)
    ratio: float = attrs.field(default=1.0, validator=_check_ratio)
    max_scale: float = attrs.field(default=4.0, validator=_check_scale)
    smoothing: float = attrs.field(default=0.95, validator=_check_smoothing)
    warmup: int = attrs.field(default=200, validator=whole_number(0, of="iterations"))
    _members: dict[str, set[int]] = attrs.field(factory=dict, init=False, repr=False)
    # Sums of logarithms and of weights, so that the first iterations count for what they are.
    _sum: Tensor = attrs.field(factory=lambda: torch.zeros(()), init=False, repr=False)
    _weight: Tensor = attrs.field(factory=lambda: torch.zeros(()), init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Balance the trainer's gradients when they are ready."""
        if any(isinstance(handler, GradientClipping) for handler in trainer.handlers):
            raise ValueError(
                "ModalityBalancing must be attached before GradientClipping, got it after: what it "
                "strengthens would pass the bound"
            )
        self._find(trainer)
        shared_norms(trainer)
        self._to(trainer.device)
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, self._balance)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running average."""
        return {"sum": self._sum, "weight": self._weight}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on from an average that `state_dict` returned."""
        device = self._sum.device
        self._sum, self._weight = state_dict["sum"].to(device), state_dict["weight"].to(device)

    def _to(self, device: torch.device) -> None:
        self._sum, self._weight = self._sum.to(device), self._weight.to(device)

    def _start(self, trainer: Trainer) -> None:
        self._find(trainer)
        if trainer.state.iteration == 0:
            self._sum, self._weight = torch.zeros_like(self._sum), torch.zeros_like(self._weight)

    def _find(self, trainer: Trainer) -> None:
        self._members = find_components(trainer, self.components)
        first, second = self._members.values()
        if first & second:
            raise ValueError(
                f"components must have no parameter in common, got {len(first & second)} that "
                f"belong to both of {' and '.join(self._members)}"
            )

    def _balance(self, trainer: Trainer) -> None:
        shared = shared_norms(trainer)
        measured = shared.measure_anew(trainer)
        gradients: list[list[Tensor]] = []
        norms = []
        for members in self._members.values():
            indices = [i for i, p in enumerate(measured.parameters) if id(p) in members]
            gradients.append([g for i in indices if (g := measured.parameters[i].grad) is not None])
            norms.append(norm_of([measured.norms[i] for i in indices], trainer.device))
        scales = self._scales(*norms)
        if trainer.state.iteration <= self.warmup:
            scales = torch.ones_like(scales)
        else:
            for part, scale in zip(gradients, scales.unbind(), strict=True):
                if part:
                    torch._foreach_mul_(local_parts(part), scale)
            shared.forget()
        self._publish(trainer, scales)

    def _scales(self, first: Tensor, second: Tensor) -> Tensor:
        """Take in the norms of an iteration; return both scales [2]."""
        difference = (first.log() - second.log()).to(self._sum.dtype)
        usable = difference.isfinite()
        kept = torch.where(usable, self.smoothing, 1.0)
        self._sum = kept * self._sum + torch.where(usable, difference, 0.0)
        self._weight = kept * self._weight + usable
        excess = self._average() - math.log(self.ratio)
        return torch.stack([-excess, excess]).clamp(0.0, math.log(self.max_scale)).exp()

    def _average(self) -> Tensor:
        # Without a usable iteration nothing is known, and nothing is scaled.
        return torch.where(self._weight > 0, self._sum / self._weight, math.log(self.ratio))

    def _publish(self, trainer: Trainer, scales: Tensor) -> None:
        scalars = {"balancing/ratio": self._average().exp()}
        for name, scale in zip(self._members, scales.unbind(), strict=True):
            scalars[f"balancing/scale/{name}"] = scale
        trainer.metrics.update(scalars)
