"""A model's own logit scale as the temperature of a loss, so that there is one and not two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.losses.base.contrastive import BaseContrastiveLoss
from diptych.losses.base.temperature import Temperature


class SharedTemperature(Temperature):
    """A learned temperature whose parameter belongs to a model: ln(1 / tau), of one element.

    Args:
        logit_scale: The model's parameter, in any shape of one element.
        min_scale: Lower bound of s = 1 / tau, held by `constrain`; None: unbounded.
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
        self.logit_scale = logit_scale

    def scale(self, like: Tensor) -> Tensor:
        """Return s, 0-dim, in the type and on the device that a temperature of its own has."""
        return super().scale(like).reshape(())

    def extra_repr(self) -> str:
        """Return what print(loss) shows; no device is read for it."""
        return f"the model's logit_scale, scale in [{self.min_scale}, {self.max_scale}]"


def share_logit_scale(
    loss: BaseContrastiveLoss,
    model: nn.Module,
    *,
    scale: str = "logit_scale",
    bias: str = "logit_bias",
) -> BaseContrastiveLoss:
    """Make a loss on pairs use, and train, the logit scale that a model brings along.

    Models of `transformers` and `open_clip` hold ln(1 / tau) as `logit_scale`, those for SigLIP a
    `logit_bias` too. The loss takes these very parameters for its own: one scale is trained, the
    model's checkpoint has it, and `constrain` holds it within the loss's bounds. Build the
    optimizer from the model's parameters, which hold it already.

    Args:
        loss: A loss with a temperature, such as `CLIPLoss` or `SigLIPLoss`; changed in place.
        model: The model.
        scale: The path of its logit scale.
        bias: The path of its logit bias, which a loss with a `bias` takes.

    Returns:
        The loss.

    Raises:
        TypeError: If the loss has no temperature.
        ValueError: If the model has no such parameter, or one of several elements.
    """
    own = getattr(loss, "temperature", None)
    if not isinstance(own, Temperature):
        raise TypeError(f"loss must have a temperature, such as CLIPLoss, got {loss!r}")
    found = _parameter(model, scale)
    loss.temperature = SharedTemperature(found, min_scale=own.min_scale, max_scale=own.max_scale)
    if hasattr(loss, "bias"):
        loss.bias = _parameter(model, bias)
        loss._rounding = 0.0  # type: ignore[assignment] # noqa: SLF001 - of a bias of its own
    return loss


def _parameter(model: nn.Module, path: str) -> nn.Parameter:
    """Return the parameter of one element at a path."""
    named = dict(model.named_parameters())
    if path not in named:
        single = [name for name, parameter in named.items() if parameter.numel() == 1]
        raise ValueError(
            f"the model must have a parameter {path!r}, got none; of one element are "
            f"{', '.join(single[:8]) or 'none'}"
        )
    if named[path].numel() != 1 or not torch.is_floating_point(named[path]):
        raise ValueError(
            f"{path} must be one floating-point number, got {named[path].dtype} "
            f"{tuple(named[path].shape)}"
        )
    return named[path]
