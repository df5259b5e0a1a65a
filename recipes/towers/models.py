"""The models that towers make: two towers for pairs, and one for images alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diptych.handlers.extras import check_extra
from diptych.recipes.towers.parts import ImageTower, TextTower, Tokens, TowerError, Towers

SWITCHES = ("gradient_checkpointing_enable", "set_grad_checkpointing")
"""The methods with which towers recompute activations."""


class Normalized(nn.Module):
    """Pixels, uint8 [B, 3, H, W], scaled to [0, 1] and normalised; a part of the model.

    Args:
        tower: the tower whose mean and deviation to use.
    """

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        for name, values in (("mean", tower.mean), ("std", tower.std)):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return float pixels."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (pixels.to(mean.dtype) / 255 - mean) / std


class TwoTowers(nn.Module):
    """An image tower and a text tower that map to features of one dimension.

    A tower gets a linear projection, unless its features have the dimension and are made to be
    compared. A logit scale of the towers is a parameter of the model.

    Args:
        towers: both towers.
        dim: the dimension; None: the image tower's, if it needs no projection, else 256.
    """

    def __init__(self, towers: Towers, dim: int | None = None) -> None:
        super().__init__()
        if towers.text is None:
            raise TowerError("towers must have a text tower, got none. Pass Towers(text=...)")
        dim = dim or (towers.image.width if towers.image.projected else 256)
        image, text = towers.image, towers.text
        self.encode_image = nn.Sequential(Normalized(image), image.module, _projection(image, dim))
        self.encode_text = nn.Sequential(text.module, _projection(text, dim))
        self.logit_scale, self.logit_bias = towers.logit_scale, towers.logit_bias

    def forward(self, image: Tensor, text: Tokens) -> tuple[Tensor, Tensor]:
        """Return image features and text features, both [B, dim], not normalised."""
        return self.encode_image(image), self.encode_text(text)


class OneTower(nn.Module):
    """An image tower with a head on its features.

    Args:
        tower: the tower.
        head: maps features [B, width] to what the loss takes.
    """

    def __init__(self, tower: ImageTower, head: nn.Module) -> None:
        super().__init__()
        self.encode_image = nn.Sequential(Normalized(tower), tower.module)
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        """Return the head's output for pixels [B, 3, H, W]."""
        output: Tensor = self.head(self.encode_image(image))
        return output


def projector(width: int, dim: int) -> nn.Module:
    """Return the head for two views: a hidden layer as wide as the features (SimCLR)."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim))


def lock(tower: ImageTower | TextTower) -> None:
    """Freeze a tower, in eval mode (LiT, arXiv:2111.07991); a projection added to it is trained."""
    tower.module.requires_grad_(requires_grad=False).eval()


def add_lora(tower: ImageTower | TextTower, rank: int) -> None:
    """Freeze a tower, and add low-rank updates to its linear layers (LoRA, arXiv:2106.09685).

    Raises:
        TowerError: if it has no linear layer.
        ImportError: if peft is not installed.
    """
    check_extra("peft", "peft", needed_by="lora")
    import peft  # noqa: PLC0415 - an extra

    # Subclasses, such as the output of torch's attention, are used by their weights alone. A layer
    # that is frozen already is not used.
    names = [
        name
        for name, part in tower.module.named_modules()
        if type(part) is nn.Linear and part.weight.requires_grad
    ]
    if not names:
        raise TowerError("lora must have linear layers to adapt, got a tower without any")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    peft.inject_adapter_in_model(config, tower.module)


def merge_lora(tower: ImageTower | TextTower) -> None:
    """Add the low-rank updates of a tower to its weights; it is then a plain model again."""
    for name, part in list(tower.module.named_modules()):
        if hasattr(part, "lora_A"):
            part.merge()
            tower.module.set_submodule(name, part.base_layer)


def checkpoint_gradients(tower: ImageTower | TextTower) -> None:
    """Make a tower recompute its activations in the backward pass, which takes less memory.

    Raises:
        TowerError: if the tower cannot.
    """
    switch: Any = next(
        (getattr(tower.module, name, None) for name in SWITCHES if hasattr(tower.module, name)),
        None,
    )
    if switch is None:
        raise TowerError(
            "gradient_checkpointing must be off for a tower without it, such as the small ones, "
            f"got {type(tower.module).__name__}"
        )
    switch()


def _projection(tower: ImageTower | TextTower, dim: int) -> nn.Module:
    if tower.projected and tower.width == dim:
        return nn.Identity()
    return nn.Linear(tower.width, dim, bias=False)
