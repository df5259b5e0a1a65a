"""Temperature: fixed, scheduled, or learned in log space within bounds."""

from __future__ import annotations

import functools
import math
from numbers import Real
from typing import cast

import torch
from torch import Tensor, nn

from diptych.losses.base.validation import HALF, check_positive, working_dtype


class Temperature(nn.Module):
    """A temperature tau; a loss multiplies similarities by the scale s = 1 / tau.

    If learned, the parameter `logit_scale` holds ln(s) (CLIP, arXiv:2103.00020): updates are
    relative and s stays positive. Give it no weight decay, which would pull tau towards 1, and call
    `constrain` after each optimizer step, which keeps s within its bounds. If fixed, it is a plain
    number, which a checkpoint of the run holds, not the state dict. `value` may be set at any time.

    Args:
        value: tau, > 0.
        learn: Whether tau is learned.
        min_scale: Lower bound of a learned s; None: unbounded.
        max_scale: Upper bound of a learned s; None: unbounded.

    Raises:
        ValueError: If `value` is not > 0, the bounds are not ordered, or a learned `value` lies
            outside its bounds.
    """

    def __init__(
        self,
        value: float,
        *,
        learn: bool = False,
        min_scale: float | None = None,
        max_scale: float | None = None,
    ) -> None:
        super().__init__()
        _check(value)
        self.min_scale = min_scale
        self.max_scale = max_scale
        self._check_bounds(value, learn=learn)
        self._initial = float(value)
        self._value = None if learn else float(value)  # as `value`, in the identity of a run
        self.logit_scale: nn.Parameter | None = None
        self._initial_log = 0.0
        if learn:
            log_scale = -math.log(value)
            self.logit_scale = nn.Parameter(torch.tensor(log_scale, dtype=torch.float32))
            # ln(s) rounded to float32. The scale is relative to it, so that a float64 loss starts
            # from exactly the requested temperature, not from one rounded to 1e-8.
            self._initial_log = float(torch.tensor(log_scale, dtype=torch.float32, device="cpu"))

    def _check_bounds(self, value: float, *, learn: bool) -> None:
        low = 0.0 if self.min_scale is None else self.min_scale
        high = math.inf if self.max_scale is None else self.max_scale
        if not 0 <= low < high:
            raise ValueError(
                f"min_scale and max_scale must satisfy 0 < min < max, got {low} and {high}"
            )
        slack = 1e-9  # 1 / 0.01 is not exactly 100
        if learn and not low * (1 - slack) <= 1 / value <= high * (1 + slack):
            raise ValueError(
                "temperature must, if learned, lie in"
                f" [{1 / high:g}, {1 / low if low else math.inf:g}], got {value}."
                f" {_other_scale(value)}Widen the bounds of the scale, or do not learn the"
                " temperature."
            )

    @property
    def learned(self) -> bool:
        """Whether tau is a parameter."""
        return self.logit_scale is not None

    @property
    def value(self) -> float:
        """Tau as a number. Reading a learned tau waits for its device; setting it does not."""
        if self.logit_scale is None:
            return cast(float, self._value)
        return self._initial * math.exp(self._initial_log - float(self.logit_scale.detach()))

    @value.setter
    def value(self, value: float) -> None:
        """Set tau, > 0."""
        _check(value)
        if self.logit_scale is None:
            self._value = float(value)
        else:
            with torch.no_grad():
                self.logit_scale.fill_(-math.log(value))

    def scale(self, like: Tensor) -> Tensor:
        """Return s = 1 / tau, 0-dim, on the device of `like`, in its working dtype."""
        dtype = working_dtype(like)
        if self.logit_scale is None:
            return torch.full((), 1 / self.value, dtype=dtype, device=like.device)
        change = self.logit_scale.to(dtype) - self._initial_log
        return change.exp() / self._initial

    @torch.no_grad()
    def constrain(self) -> None:
        """Clamp a learned scale to its bounds, in place. Call after each optimizer step."""
        if self.logit_scale is not None and (self.min_scale or self.max_scale):
            dtype = self.logit_scale.dtype
            self.logit_scale.clamp_(
                min=_log(self.min_scale, dtype, inward=1) if self.min_scale else None,
                max=_log(self.max_scale, dtype, inward=-1) if self.max_scale else None,
            )

    def scalars(self) -> dict[str, Tensor]:
        """Return `temperature` and `logit_scale` (ln s), detached, for logs."""
        like = torch.empty(0) if self.logit_scale is None else self.logit_scale
        scale = self.scale(like).detach()
        return {"temperature": 1 / scale, "logit_scale": scale.log()}

    def extra_repr(self) -> str:
        """Return the text in print(loss), without reading the device."""
        if not self.learned:
            return f"{self._value:g}"
        return f"learned from {self._initial:g}, scale in [{self.min_scale}, {self.max_scale}]"


@functools.cache
def _log(bound: float, dtype: torch.dtype, *, inward: int) -> float:
    """Return the logarithm of a bound; in half precision one that is within it.

    ln(100) rounds to 4.6055 in float16, which is the logarithm of 100.03.

    Args:
        bound: Of the scale, > 0.
        dtype: Of the parameter.
        inward: 1 for a lower bound, -1 for an upper one.
    """
    exact = math.log(bound)
    rounded = float(torch.tensor(exact, dtype=dtype, device="cpu"))
    if dtype not in HALF or inward * (rounded - exact) >= 0:
        return exact
    _, exponent = math.frexp(rounded)
    return rounded + inward * math.ldexp(torch.finfo(dtype).eps, exponent - 1)


def _check(value: float) -> None:
    if isinstance(value, nn.Parameter) or not isinstance(value, (Real, Tensor)):
        raise TypeError(
            f"temperature must be a number, got a {type(value).__name__}. The loss makes the"
            " parameter itself, with learn_temperature=True"
        )
    if value <= 0:
        raise ValueError(
            f"temperature must be > 0, got {value}. Similarities are divided by it; 0.01 to 0.5"
            " are usual"
        )
    check_positive("temperature", value)


def _other_scale(value: float) -> str:
    """Return what a value above 1 looks like: ln(1 / temperature), or 1 / temperature."""
    if not 1 < value <= 1000:
        return ""
    if value < 7:
        return f"If it is the logarithm of a scale, pass exp(-{value}) = {math.exp(-value):.4g}. "
    return f"If it is a scale, pass 1 / {value} = {1 / value:.4g}. "
