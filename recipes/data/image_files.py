"""Files of images: where a name leads, what is wrong with a file, and its pixels."""

from __future__ import annotations

import glob
import os
import posixpath
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.handlers.contained_paths import LONGEST_NAME
from diptych.recipes.data.rows import DataError, reported
from diptych.recipes.data.text_tables import SUFFIXES, is_image_name

if TYPE_CHECKING:
    from PIL import Image

MOST_BYTES, MOST_PIXELS = 100_000_000, 64_000_000
"""The largest file and the largest image that are read."""
SAMPLE = 200
"""The names with which a folder that all names begin with is looked for."""
ROOM = 2
"""A JPEG is decoded at the smallest scale with at least so many times the side that is needed."""

NO_NAME = "the image name is empty"
MISSING = "the file is missing"
NO_FILE = "the path is that of a folder or a device, not of a file"
A_URL = "the image is a URL: download it, as img2dataset does into tar files for --shards"
OUTSIDE = "the file is outside the folder of the images (--allow-outside reads it)"
LONG_NAME = f"the image name has a part of more than {LONGEST_NAME} bytes"
BAD_NAME = "the image name has a character that no name of a file has"
UNREADABLE = "the file cannot be read as an image"
A_PROGRAM = "the file is PostScript, a program that would be run to draw the image"
TOO_LARGE = f"the file has more than {MOST_BYTES:,} bytes"
TOO_MANY_PIXELS = f"the image has more than {MOST_PIXELS:,} pixels"
NO_COLOURS = "the image has negative or fractional values, which are not colours"


class ImageError(DataError):
    """A file is no image that can be read; the message is the kind of problem."""


@attrs.frozen
class ImageFolder:
    r"""A folder of images, in which names from a file are looked up.

    A name may be `a.jpg`, `./a.jpg`, `sub\a.jpg` as Windows writes it, or have its suffix in
    other letters (`a.JPG`), or no suffix if one image has the name. Names that all begin with
    folders that are not there, such as `val2014/`, are looked up without them.

    Args:
        root: the folder.
        allow_outside: whether a name may lead out of it: an absolute name, one with `..`, or a
            symbolic link. A file from somebody else could name any file of this machine.
    """

    root: Path
    allow_outside: bool = False

    def find(self, names: Iterable[str]) -> dict[str, Path | str]:
        """Return the path of each name, or the problem with it, in words."""
        found = {name: self._find(name) for name in dict.fromkeys(names)}
        missing = {name: _parts(name) for name, one in found.items() if one == MISSING}
        dropped = self._dropped(missing)
        if dropped:
            found |= {name: self._find("/".join(p[dropped:])) for name, p in missing.items()}
        gone = [name for name, one in found.items() if one == MISSING]
        found |= dict.fromkeys((name for name in gone if "://" in name), A_URL)
        below = self._below(gone[0]) if 0 < len(gone) == len(found) else None
        if below is not None:
            found = dict.fromkeys(gone, f"{MISSING}: {below} has it, which --images may name")
        return found

    def _below(self, name: str) -> Path | None:
        """Return the subfolder in which a name leads to a file."""
        parts = _parts(name)
        paths = self.root.rglob(glob.escape("/".join(parts))) if parts else iter(())
        return next((path.parents[len(parts) - 1] for path in paths), None)

    def _dropped(self, missing: Mapping[str, tuple[str, ...]]) -> int:
        """Return how many folders at the beginning of the missing names to leave out."""
        some = list(missing.values())[:SAMPLE]
        for number in range(1, max(map(len, some), default=0)):
            if any(
                (self.root / "/".join(parts[number:])).is_file() for parts in some if parts[number:]
            ):
                left = {parts[number:] for parts in missing.values()}
                return number if len(left) == len(set(missing.values())) else 0
        return 0

    def _find(self, name: str) -> Path | str:
        problem = _problem_of_name(name)
        if problem:
            return problem
        try:
            path = next(filter(Path.exists, self._spellings(name)), self.root / name)
            resolved = path.resolve()
            if not self.allow_outside and not resolved.is_relative_to(self.root.resolve()):
                return OUTSIDE if path.exists() or ".." in Path(name).parts else MISSING
            return _problem_of_file(resolved) or path
        except (OSError, RuntimeError) as error:  # no permission, or a loop of symbolic links
            return f"the file cannot be read: {getattr(error, 'strerror', None) or error}"

    def _spellings(self, name: str) -> Iterable[Path]:
        yield self.root / name
        plain = name.replace("\\", "/")
        stem, suffix = posixpath.splitext(plain)
        yield self.root / plain
        yield self.root / unquote(plain)  # `a%20b.jpg`
        yield self.root / f"{stem}{suffix.upper()}"
        yield self.root / f"{stem}{suffix.lower()}"
        for form in ("NFC", "NFD"):  # macOS writes an accent as a letter of its own
            yield self.root / unicodedata.normalize(form, plain)
        if not is_image_name(plain):
            named = [self.root / f"{plain}{suffix}" for suffix in sorted(SUFFIXES)]
            there = [path for path in named if path.exists()]
            yield from there if len(there) == 1 else ()


def _parts(name: str) -> tuple[str, ...]:
    """Return the parts of a name; none if it has a `..`, which must not lose its meaning."""
    plain = re.sub(r"^[A-Za-z]:", "", name.replace("\\", "/"))
    parts = tuple(part for part in plain.split("/") if part not in {"", "."})
    return () if ".." in parts else parts


def _problem_of_name(name: str) -> str | None:
    if not name:
        return NO_NAME
    if "\0" in name:
        return BAD_NAME
    is_long = any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(name).parts)
    return LONG_NAME if is_long else None


def _problem_of_file(path: Path) -> str | None:
    if not path.exists():
        return MISSING
    if not path.is_file():
        return NO_FILE
    return TOO_LARGE if path.stat().st_size > MOST_BYTES else None


def read_image(path: Path | BinaryIO, size: int) -> Image.Image:
    """Return an image in RGB, upright, on white where it is transparent; the first of several.

    Args:
        path: the file, or an open one.
        size: the side that will be needed, in pixels: a large JPEG is decoded at a smaller scale.

    Raises:
        ImageError: if the file is not an image that can be read.
    """
    from PIL import Image  # noqa: PLC0415 - an extra

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(path)  # reads the header alone
        with file:
            return in_colour(_checked(file), size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(TOO_MANY_PIXELS) from error
    except PermissionError as error:
        raise ImageError(f"the file cannot be read: {error.strerror}") from error
    except DataError:
        raise
    # Pillow's exception depends on the format, and on where the file is broken: a decoder may raise
    # a RuntimeError, a NotImplementedError or an AttributeError as well.
    except Exception as error:
        raise ImageError(UNREADABLE) from error


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def unreadable(paths: Iterable[Path], size: int, *, workers: int = 0) -> dict[Path, str]:
    """Decode images, and return the problem of each that cannot be read.

    Args:
        paths: the files; each is read once.
        size: the side that is needed.
        workers: threads that decode, beside this one.
    """

    def problem(path: Path) -> str | None:
        try:
            read_image(path, size)
        except ImageError as error:
            return str(error)
        return None

    files = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(max_workers=workers + 1) as pool:
        found = reported(pool.map(problem, files), "Checked images", len(files))
        return {path: text for path, text in zip(files, found, strict=True) if text}


def _checked(file: Image.Image) -> Image.Image:
    if file.format == "EPS":
        raise ImageError(A_PROGRAM)
    if file.width * file.height > MOST_PIXELS:
        raise ImageError(TOO_MANY_PIXELS)
    return file


def in_colour(file: Image.Image, size: int) -> Image.Image:
    """Return an image of any mode as `read_image` does."""
    from PIL import Image, ImageOps  # noqa: PLC0415 - an extra

    file.draft(None, (ROOM * size, ROOM * size))
    bits, signed = _depth(file)
    image = ImageOps.exif_transpose(file)
    if image.mode[0] in "IF":  # one value per pixel, which Pillow would clip at 255
        image = Image.fromarray(_eight_bits(np.asarray(image), bits, signed=signed))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _depth(file: Image.Image) -> tuple[int, bool]:
    """Return the bits per value that a TIFF file declares, and whether values have a sign.

    Other formats have at most 16 bits, without a sign.
    """
    tags = getattr(file, "tag_v2", {})
    bits, kind = (tags.get(number, (default,)) for number, default in ((258, 16), (339, 1)))
    return int(np.max(bits)), int(np.max(kind)) == 2


def _eight_bits(values: NDArray[Any], bits: int, *, signed: bool) -> NDArray[np.uint8]:
    """Return values scaled to [0, 255].

    Files of 9 to 16 bits are scaled by their bits. Those of 32 bits do not say which value is
    white: it is the largest value of 8, 16 or 32 bits, whichever is the first to hold all values.
    Fractions are expected in [0, 1].
    """
    if values.dtype.kind == "f":
        if not (values.min() >= 0 and values.max() <= 1):
            raise ImageError(NO_COLOURS)
        return np.asarray((values * 255).round(), np.uint8)
    whole = values.astype(np.int64)
    if bits == 32 and not signed:
        whole &= 2**32 - 1  # Pillow has no unsigned mode
    if whole.min() < 0:
        raise ImageError(NO_COLOURS)
    whites: tuple[int, ...] = (2**bits - 1,) if 8 < bits < 16 else ()
    most = int(whole.max())
    if bits == 32:
        whites = (255,)
    white = next(one for one in (*whites, 65_535, 2**32 - 1) if one >= most)
    return np.asarray(whole * 255 // white, np.uint8)
