"""A model's own logit scale as the temperature of a loss, so that there is only one."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from diptych.losses.base.contrastive import BaseContrastiveLoss
from diptych.losses.base.temperature import Temperature

LossT = TypeVar("LossT", bound=nn.Module)


class SharedTemperature(Temperature):
    """A learned temperature whose parameter, ln(1 / tau) in one element, belongs to a model.

    Args:
        logit_scale: The model's parameter, in any shape of one element.
        min_scale: Lower bound of s = 1 / tau, enforced by `constrain`; None: unbounded.
        max_scale: Upper bound of s; None: unbounded.
    """

    def __init__(
        self,
        logit_scale: nn.Parameter,
        *,
        min_scale: float | None = None,
        max_scale: float | None = None,
    ) -> None:
        super().__init__(1.0, min_scale=min_scale, max_scale=max_scale)
        self.logit_scale, self._value = logit_scale, None

    def scale(self, like: Tensor) -> Tensor:
        """Return s, 0-dim for any shape of the parameter; otherwise as `Temperature.scale`."""
        return super().scale(like).reshape(())

    def extra_repr(self) -> str:
        """Return the text in print(loss), without reading the device."""
        return f"the model's logit_scale, scale in [{self.min_scale}, {self.max_scale}]"


def share_logit_scale(
    loss: LossT,
    model: nn.Module,
    *,
    scale: str = "logit_scale",
    bias: str | None = "logit_bias",
) -> LossT:
    """Make a loss on pairs use, and train, the logit scale of a model.

    Models of `transformers` and `open_clip` hold ln(1 / tau) as `logit_scale`; those trained with
    SigLIP hold a `logit_bias` too. The loss uses these very parameters: one scale is trained, it is
    in the model's checkpoint, and `constrain` keeps it within the loss's bounds. Build the
    optimizer from the model's parameters, which include it.

    Args:
        loss: A loss with a temperature, such as `CLIPLoss` or `SigLIPLoss`, or a loss built from
            others, whose parts with a learned temperature share it; changed in place.
        model: The model.
        scale: The path of its logit scale, or the last part of it: a wrapper puts names in front.
        bias: The path of its logit bias, likewise, for a loss that has a `bias`; None: the loss
            trains its own, as a model without one needs it.

    Returns:
        The loss.

    Raises:
        TypeError: If the loss has no temperature.
        ValueError: If the model has no such parameter, or it has several elements.
    """
    for part in _sharing(loss):
        own, shared = part.temperature, _parameter(model, scale)
        part.temperature = SharedTemperature(
            shared, min_scale=own.min_scale, max_scale=own.max_scale
        )
        _warn_of_bounds(part.temperature, scale)
        if bias is not None:
            part.share_bias(partial(_parameter, model, bias))
    return loss


def _warn_of_bounds(temperature: Temperature, path: str) -> None:
    """Warn of a scale that the first update would move to a bound: it may be no logarithm."""
    parameter = temperature.logit_scale
    assert parameter is not None
    if parameter.is_meta:
        return
    value = float(parameter.detach())
    low, high = temperature.min_scale or 0.0, temperature.max_scale or math.inf
    slack = 1.02  # ln(100) in half precision
    if not low / slack <= math.exp(min(value, 700.0)) <= high * slack:
        warnings.warn(
            f"{path} should be ln(1 / temperature), with a scale in [{low:g}, {high:g}], got"
            f" {value:.4g}: the first update moves it to a bound. If it is the scale itself, let"
            " the model hold its logarithm; otherwise give the loss another max_logit_scale.",
            stacklevel=3,
        )


def _sharing(loss: nn.Module) -> list[BaseContrastiveLoss]:
    """Return a loss with a temperature, or the parts of a loss whose temperature is learned."""
    if isinstance(loss, BaseContrastiveLoss):
        return [loss]
    parts = [one for one in loss.modules() if isinstance(one, BaseContrastiveLoss)]
    learned = [part for part in parts if part.temperature.learned]
    if not learned:
        raise TypeError(f"loss must have a temperature, such as CLIPLoss, got {loss!r}")
    return learned


def _parameter(model: nn.Module, path: str) -> nn.Parameter:
    """Return the parameter of one element at a path."""
    named = dict(model.named_parameters())
    ends = [path] if path in named else [x for x in named if f".{x}".endswith(f".{path}")]
    if len(ends) > 1:  # of a momentum model, the trained one
        ends = [x for x in ends if named[x].requires_grad] or ends
    if len(ends) != 1:
        raise _none_or_several(path, ends, named)
    path = ends[0]
    if named[path].numel() != 1 or not torch.is_floating_point(named[path]):
        raise ValueError(
            f"{path} must be one floating-point number, got {named[path].dtype}"
            f" {tuple(named[path].shape)}"
        )
    return named[path]


def _none_or_several(path: str, found: list[str], named: dict[str, nn.Parameter]) -> ValueError:
    single = [name for name, parameter in named.items() if parameter.numel() == 1]
    without = " With bias=None the loss keeps its own bias." if "bias" in path else ""
    return ValueError(
        f"model must have a parameter {path!r}, got {'several' if found else 'none'}. Pass the"
        f" whole path. Its parameters of one element are: {', '.join(single[:8]) or 'none'}."
        f"{without}"
    )
