"""Gauges of parameters: the share of moving weights, and the position of learned temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diptych.engine.distributed.dtensor import norms


@runtime_checkable
class BoundedScale(Protocol):
    """A learned temperature: the parameter ln(1 / tau), and the bounds of 1 / tau."""

    logit_scale: Tensor | None
    min_scale: float | None
    max_scale: float | None


def temperature_positions(loss: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return gauges of the temperatures of a loss that are learned between two bounds, by name.

    A single one is called `temperature_position`; of several, each has its module's path in front.
    A gauge is the position of ln(1 / tau) between its bounds, from 0 to 1.
    """
    found = {}
    for path, module in loss.named_modules():
        if not isinstance(module, BoundedScale) or module.logit_scale is None:
            continue
        if module.min_scale and module.max_scale:
            bounds = math.log(module.min_scale), math.log(module.max_scale)
            found[path] = partial(_position, module, *bounds)
    if len(found) == 1:
        return {"temperature_position": next(iter(found.values()))}
    return {f"{path}/temperature_position": gauge for path, gauge in found.items()}


def _position(scale: BoundedScale, low: float, high: float) -> Tensor:
    assert scale.logit_scale is not None
    return (scale.logit_scale.detach().float() - low) / (high - low)


def components(model: nn.Module) -> dict[str, nn.Module]:
    """Return the children of a model that have parameters; for a mere wrapper, those of its child.

    A wrapper has one child and no parameters of its own.
    """
    children = {n: c for n, c in model.named_children() if any(True for _ in c.parameters())}
    if len(children) == 1 and not any(True for _ in model.parameters(recurse=False)):
        ((name, child),) = children.items()
        return components(child) or {name: child}
    return children


class MovingShare:
    """The share of a module's parameters that have changed since the last call.

    A parameter has changed if its norm has: only one number per parameter is kept.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters: list[Tensor] = list(module.parameters())
        self._norms: Tensor | None = None

    @property
    def frozen(self) -> bool:
        """Whether no parameter requires a gradient."""
        return not any(parameter.requires_grad for parameter in self._parameters)

    def start(self, kept: Sequence[float] | None = None) -> None:
        """Compare the next call with these norms; None: with the current ones."""
        now = self._current_norms()
        self._norms = now if kept is None else now.new_tensor(kept)

    def state(self) -> list[float] | None:
        """Return the norms that the next call compares with."""
        return None if self._norms is None else self._norms.tolist()

    def __call__(self) -> Tensor:
        """Return the share, a scalar on the parameters' device."""
        now = self._current_norms()
        before = now if self._norms is None else self._norms
        self._norms = now
        return (now != before).float().mean()

    @torch.no_grad()
    def _current_norms(self) -> Tensor:
        # In half precision, rounding of the norm would hide changes of the weights.
        wide = any(parameter.dtype == torch.float64 for parameter in self._parameters)
        found = norms(self._parameters, None if wide else torch.float32)
        return torch.stack([norm.float() for norm in found])
