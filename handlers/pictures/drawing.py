"""Drawing of pictures: thumbnails, sheets of retrieval results, heat maps, tiles."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, GAP = 48, 6
TEXT_WIDTH, LINE = 190, 14
RIGHT, WRONG, INK, PAPER = "#1a9850", "#d7dbe0", "#20242a", "white"
# From dark to light: a few colours of a perceptually uniform scale.
COLOR_SCALE = (
    (13, 8, 84),
    (84, 15, 140),
    (158, 40, 128),
    (216, 87, 92),
    (248, 149, 64),
    (245, 232, 60),
)


@attrs.frozen(eq=False)
class RetrievedItem:
    """One of a query's results.

    Attributes:
        content: an image [C, H, W], or a text.
        matches: whether it matches the query.
    """

    content: Tensor | str
    matches: bool


@attrs.frozen(eq=False)
class QueryResults:
    """A query and its results, the best first.

    Attributes:
        query: an image [C, H, W], or a text.
        rank: of the best match, from 1; None if nothing matches.
        results: all images, or all texts.
    """

    query: Tensor | str
    rank: int | None
    results: Sequence[RetrievedItem]


def as_bytes(images: Tensor) -> Tensor:
    """Return images [..., C, H, W] as uint8 [..., 3, H, W]; floats are in [0, 1], as truths are.

    Of two channels the first is grey, of more than three the first three are colours.
    """
    channels = images.shape[-3]
    if channels not in {1, 3}:
        images = images[..., : 3 if channels > 3 else 1, :, :]
    if images.is_floating_point() or images.dtype is torch.bool:
        images = images.float().nan_to_num().clamp(0, 1).mul(255).round()
    images = images.to(torch.uint8).cpu()
    return images.expand(*images.shape[:-3], 3, *images.shape[-2:])


def thumbnails(images: Tensor, side: int) -> Tensor:
    """Return images [N, C, H, W], scaled to fit, as uint8 [N, 3, side, side] on white."""
    whole = as_bytes(images).float()
    height, width = whole.shape[-2:]
    scale = side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if scale > 1:
        scaled = F.interpolate(whole, size=size, mode="nearest")
    else:
        scaled = F.interpolate(whole, size=size, mode="bilinear", antialias=True)
    canvas = whole.new_full((len(whole), 3, side, side), 255.0)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    canvas[:, :, top : top + size[0], left : left + size[1]] = scaled
    return canvas.round().clamp(0, 255).to(torch.uint8)


def draw_results(rows: Sequence[QueryResults]) -> Tensor:
    """Return a picture, uint8 [3, H, W], with a row for each query.

    A row shows the query, the rank of its best match, and the results, with matches in green.
    """
    from PIL import Image, ImageDraw  # noqa: PLC0415

    in_text = isinstance(rows[0].results[0].content, str)
    count = max(len(row.results) for row in rows)
    height = max(SIDE, LINE * count if in_text else 0) + 2 * GAP
    head = SIDE if isinstance(rows[0].query, Tensor) else TEXT_WIDTH
    body = 3 * TEXT_WIDTH // 2 if in_text else count * (SIDE + 2 * GAP)
    width = head + 4 * GAP + SIDE + body
    picture = Image.new("RGB", (width, height * len(rows)), PAPER)
    draw = ImageDraw.Draw(picture)
    for index, row in enumerate(rows):
        top = index * height
        _put(picture, row.query, (GAP, top + GAP), head)
        left = head + 2 * GAP
        found = "none" if row.rank is None else f"rank {row.rank}"
        draw.text((left, top + GAP + 16), found, RIGHT if row.rank == 1 else INK, _font())
        _put_results(picture, row.results, (left + SIDE + GAP, top + GAP))
    return _to_tensor(picture)


def heat_map(values: Tensor, *, side: int = 384) -> Tensor:
    """Return a matrix as a picture, uint8 [3, H, W], dark at 0 and light at 1."""
    scale = torch.tensor(COLOR_SCALE, dtype=torch.float32)
    place = values.float().cpu().nan_to_num().clamp(0, 1) * (len(scale) - 1)
    below = place.floor().long().clamp(max=len(scale) - 2)
    share = (place - below)[..., None]
    colours = scale[below] * (1 - share) + scale[below + 1] * share
    enlarged = max(1, side // max(values.shape))
    picture = colours.round().to(torch.uint8).permute(2, 0, 1)
    return picture.repeat_interleave(enlarged, 1).repeat_interleave(enlarged, 2)


def image_grid(images: Tensor, columns: int, *, gap: int = 2, rows: int | None = None) -> Tensor:
    """Return images, uint8 [N, 3, H, W], as one picture, in rows.

    Args:
        images: from left to right, then downwards.
        columns: images in a row.
        gap: pixels between two images.
        rows: of the picture; None: as many as the images fill.
    """
    count, _, height, width = images.shape
    rows = rows or -(-count // columns)
    picture = images.new_full((3, rows * (height + gap), columns * (width + gap)), 255)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        picture[:, top : top + height, left : left + width] = image
    return picture


def save_png(picture: Tensor, path: Path) -> None:
    """Write a picture, uint8 [3, H, W], as a PNG."""
    _to_image(picture).save(path, format="PNG")


def jpeg(image: Tensor, side: int) -> bytes:
    """Return an image [C, H, W], scaled to fit into a square on white, as a JPEG."""
    file = io.BytesIO()
    _to_image(thumbnails(image[None], side)[0]).save(file, format="JPEG", quality=85)
    return file.getvalue()


def _put(picture: Any, content: Tensor | str, place: tuple[int, int], width: int) -> None:
    from PIL import ImageDraw  # noqa: PLC0415

    if isinstance(content, str):
        text = _shortened(content, width)
        ImageDraw.Draw(picture).text((place[0], place[1] + 16), text, INK, _font())
        return
    picture.paste(_to_image(thumbnails(content[None], SIDE)[0]), place)


def _put_results(picture: Any, results: Sequence[RetrievedItem], place: tuple[int, int]) -> None:
    from PIL import ImageDraw  # noqa: PLC0415

    draw, (left, top) = ImageDraw.Draw(picture), place
    for index, result in enumerate(results):
        if isinstance(result.content, str):
            text = _shortened(f"{index + 1}. {result.content}", 3 * TEXT_WIDTH // 2)
            at = (left, top - 2 + index * LINE)
            draw.text(at, text, RIGHT if result.matches else INK, _font())
            continue
        x = left + index * (SIDE + 2 * GAP)
        colour, frame = (RIGHT, 3) if result.matches else (WRONG, 1)
        box = (x - frame, top - frame, x + SIDE + frame - 1, top + SIDE + frame - 1)
        draw.rectangle(box, outline=colour, width=frame)
        _put(picture, result.content, (x, top), SIDE)


def _shortened(text: str, width: int) -> str:
    text = " ".join(text.split())
    if _font().getlength(text) <= width:
        return text
    # Longer beginnings are wider, so bisection finds the longest one that fits.
    fits = bisect_right(
        range(len(text)), width, key=lambda end: _font().getlength(text[:end] + "...")
    )
    return text[: max(0, fits - 1)] + "..."


@cache
def _font() -> Any:
    from PIL import ImageFont  # noqa: PLC0415

    return ImageFont.load_default(12)


def _to_image(picture: Tensor) -> Any:
    from PIL import Image  # noqa: PLC0415

    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def _to_tensor(picture: Any) -> Tensor:
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()
