"""Augmentation of a batch of drawings, from random numbers drawn per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBER_OF_DRAWS = 11
SHIFT = 0.2  # relative to half the image
SCALE = 0.15
ROTATION = 0.2  # radians
COLOR = 0.3
GRAY_PROBABILITY = 0.1


def augment(images: Tensor, draws: Tensor, *, zoom: float = 1.0) -> Tensor:
    """Shift, scale, rotate and recolour each drawing slightly; no flips, because of arrows.

    Args:
        images: uint8 [B, 3, H, W], on white.
        draws: uniform in [0, 1), [B, NUMBER_OF_DRAWS].
        zoom: of the window around the centre that fills the image, before the random changes.

    Returns:
        Float [B, 3, H, W], about [0, 1]; colours may exceed it.
    """
    signed = 2 * draws - 1
    warped = _warp(images.float() / 255, signed[:, :4], zoom)
    colored = _recolor(warped, signed[:, 4:10])
    gray = draws[:, 10, None, None, None] < GRAY_PROBABILITY
    return torch.where(gray, colored.mean(dim=1, keepdim=True), colored)


def _warp(images: Tensor, signed: Tensor, zoom: float) -> Tensor:
    scale, angle = (1 + SCALE * signed[:, 0]) / zoom, ROTATION * signed[:, 1]
    cos, sin, shift = scale * angle.cos(), scale * angle.sin(), SHIFT * signed[:, 2:]
    rows = [
        torch.stack([cos, -sin, shift[:, 0]], dim=1),
        torch.stack([sin, cos, shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    # grid_sample pads with 0, so white must be 0 here.
    return 1 + F.grid_sample(images - 1, grid, align_corners=False)


def _recolor(images: Tensor, signed: Tensor) -> Tensor:
    change = (COLOR * signed)[:, :, None, None]
    gray = images.mean(dim=1, keepdim=True)
    images = gray + (images - gray) * (1 + change[:, 0:1])
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * (1 + change[:, 1:2])
    return images * (1 + change[:, 2:5] / 2) + change[:, 5:6] / 2
