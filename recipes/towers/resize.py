"""Resizing of an image to the square that a tower takes, as the tower's authors resized theirs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import attrs

from diptych.handlers.argument_checks import number, one_of

if TYPE_CHECKING:
    from PIL import Image

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Mode = Literal["crop", "squash", "pad"]


def _whole(value: float) -> bool:
    return isinstance(value, int)


@attrs.frozen
class Resize:
    """A resize to a square, and a crop at the centre; as torchvision's Resize and CenterCrop.

    Attributes:
        size: the side in pixels.
        interpolation: as Pillow names it.
        kept: the share of the resized image's side that the crop keeps, in (0, 1].
        mode: crop resizes the shorter side, and cuts off the ends of the longer one; squash resizes
            both sides, which changes proportions; pad resizes the longer side, and fills.
        fill: the colour to fill with, from 0 to 255.
    """

    size: int = attrs.field(
        validator=number("be whole pixels >= 1", lambda size: _whole(size) and size >= 1)
    )
    interpolation: Interpolation = attrs.field(default="bicubic", validator=one_of(Interpolation))
    kept: float = attrs.field(
        default=1.0, validator=number("be in (0, 1]", lambda value: 0 < value <= 1)
    )
    mode: Mode = attrs.field(default="crop", validator=one_of(Mode))
    fill: int = attrs.field(
        default=0,
        validator=number("be whole, in [0, 255]", lambda fill: _whole(fill) and fill in range(256)),
    )

    @property
    def resized(self) -> int:
        """The side before the crop, in pixels."""
        return math.floor(self.size / self.kept)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a square image."""
        from PIL import Image  # noqa: PLC0415 - an extra

        method, shape = Image.Resampling[self.interpolation.upper()], self._shape(*image.size)
        starts = [round((side - self.size) / 2) for side in shape]
        if self.mode == "pad":
            whole = Image.new("RGB", (self.size, self.size), (self.fill,) * 3)
            whole.paste(image.resize(shape, method), (-starts[0], -starts[1]))
            return whole
        # Only the part that is kept is computed: the whole of a long, thin image may be huge.
        ends = [start + self.size for start in starts]
        scales = [before / after for before, after in zip(image.size, shape, strict=True)]
        left, top = (start * scale for start, scale in zip(starts, scales, strict=True))
        right, bottom = (
            min(end * scale, side)
            for end, scale, side in zip(ends, scales, image.size, strict=True)
        )
        return image.resize((self.size, self.size), method, box=(left, top, right, bottom))

    def _shape(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height before the crop."""
        if self.mode == "squash":
            return self.resized, self.resized
        if self.mode == "crop":
            side = min(width, height)
            return int(self.resized * width / side), int(self.resized * height / side)
        ratio = self.resized / max(width, height)
        return max(1, round(width * ratio)), max(1, round(height * ratio))
