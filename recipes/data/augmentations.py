"""Augmentations by name; random numbers are torch's, which `SeededLoader` seeds for each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL import Image

    Augment = Callable[[Image.Image, float], Image.Image]
    Augmentation = Callable[[Image.Image], Image.Image]

ASPECT = 4 / 3
"""The largest ratio of the sides of a random crop."""
MOST_DEGREES = 30


def augmentations(names: Sequence[str]) -> list[Augmentation]:
    """Return the augmentations of some names, in their order.

    Args:
        names: each a name, or a name and a number: `crop:0.5`.

    Raises:
        ValueError: if a name is unknown, or its number is not in (0, 1].
    """
    return [_augmentation(name) for name in names]


def _augmentation(text: str) -> Augmentation:
    name, _, number = text.partition(":")
    if name not in AUGMENTATIONS:
        raise ValueError(
            f"augment must name some of {', '.join(AUGMENTATIONS)}, got {name!r}. A number may "
            "follow: crop:0.5."
        )
    augment, default = AUGMENTATIONS[name]
    try:
        strength = float(number) if number else default
    except ValueError:
        strength = math.nan
    if not 0 < strength <= 1:
        raise ValueError(f"augment must have numbers in (0, 1], got {text!r}")
    return partial(_applied, augment, strength)


def _applied(augment: Augment, strength: float, image: Image.Image) -> Image.Image:
    return augment(image, strength)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def crop(image: Image.Image, least: float) -> Image.Image:
    """Crop a rectangle of at least this share of the area, with sides of at most 4 : 3."""
    area = image.width * image.height * _uniform(least, 1)
    ratio = math.exp(_uniform(-math.log(ASPECT), math.log(ASPECT)))
    width = min(image.width, max(1, round(math.sqrt(area * ratio))))
    height = min(image.height, max(1, round(math.sqrt(area / ratio))))
    left = round(_uniform(0, image.width - width))
    top = round(_uniform(0, image.height - height))
    return image.crop((left, top, left + width, top + height))


def flip(image: Image.Image, probability: float) -> Image.Image:
    """Mirror left and right with this probability; not for text, arrows or hands."""
    from PIL import ImageOps  # noqa: PLC0415 - an extra

    return ImageOps.mirror(image) if torch.rand(()).item() < probability else image


def color(image: Image.Image, strength: float) -> Image.Image:
    """Change brightness, contrast and saturation by up to this share."""
    from PIL import ImageEnhance  # noqa: PLC0415 - an extra

    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(_uniform(1 - strength, 1 + strength))
    return image


def gray(image: Image.Image, probability: float) -> Image.Image:
    """Remove the colours with this probability."""
    return image.convert("L").convert("RGB") if torch.rand(()).item() < probability else image


def blur(image: Image.Image, probability: float) -> Image.Image:
    """Blur with this probability, by a radius of 0.1 to 2 % of the shorter side."""
    from PIL import ImageFilter  # noqa: PLC0415 - an extra

    radius = _uniform(0.001, 0.02) * min(image.size)
    blurred = torch.rand(()).item() < probability
    return image.filter(ImageFilter.GaussianBlur(radius)) if blurred else image


def rotate(image: Image.Image, turn: float) -> Image.Image:
    """Rotate by up to this share of 30 degrees, on white."""
    from PIL import Image  # noqa: PLC0415 - an extra

    angle = _uniform(-turn, turn) * MOST_DEGREES
    return image.rotate(angle, Image.Resampling.BILINEAR, fillcolor="white")


AUGMENTATIONS: dict[str, tuple[Augment, float]] = {
    "crop": (crop, 0.7),
    "flip": (flip, 0.5),
    "color": (color, 0.3),
    "gray": (gray, 0.1),
    "blur": (blur, 0.5),
    "rotate": (rotate, 0.5),
}
"""Each augmentation with the number that it has if none is given."""
