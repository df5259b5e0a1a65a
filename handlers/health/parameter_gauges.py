"""Gauges of parameters: the share of moving weights, and the position of learned temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from diptych.engine.distributed.dtensor import norms


def temperature_positions(loss: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return gauges of the temperatures of a loss that are learned between two bounds, by name.

    A single one is called `temperature_position`; of several, each has its module's path in front.
    A gauge is the position of ln(1 / tau), the parameter `logit_scale` of a module, between the
    logarithms of the module's `min_scale` and `max_scale`, from 0 to 1.
    """
    found = {}
    for path, module in loss.named_modules():
        # Not a runtime protocol: from Python 3.12 on, isinstance does not see parameters.
        low, high = getattr(module, "min_scale", None), getattr(module, "max_scale", None)
        if getattr(module, "logit_scale", None) is not None and low and high:
            found[path] = partial(_position, module, math.log(low), math.log(high))
    if len(found) == 1:
        return {"temperature_position": next(iter(found.values()))}
    return {f"{path}/temperature_position": gauge for path, gauge in found.items()}


def _position(module: nn.Module, low: float, high: float) -> Tensor:
    scale: Tensor = module.logit_scale  # type: ignore[assignment]
    return (scale.detach().float() - low) / (high - low)


class MovingShare:
    """The share of some parameters that have changed since the last call.

    A parameter has changed if its norm has: only one number per parameter is kept.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
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
