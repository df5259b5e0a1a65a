"""Train two towers on your own images and a CSV file of captions, without writing code.

    python examples/own_data.py --images DIR --captions captions.csv

The CSV file has a column `image`, file names relative to DIR, and a column `caption`; an image may
have several rows. Unusable rows are reported before training starts. Files outside DIR are not read
unless `--allow-outside` is given, nor files of more than 100 MB, 64 million pixels, or a caption
file of more than 1 GB. `--help` lists the flags.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from ignite import distributed as idist
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from diptych.engine import SeededLoader, Trainer, of_this_rank, process_group, tasks
from diptych.handlers import (
    Evaluation,
    GradientClipping,
    LearningRate,
    RetrievalRecall,
    default_handlers,
    new_run,
    parameter_groups,
)
from diptych.losses import get_loss

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find `examples` when run as a file
from examples.emoji.augment import NUMBER_OF_DRAWS, augment
from examples.emoji.data import to_tensor
from examples.emoji.model import ScaledConv2d, TwoTowers
from examples.emoji.text import tokenize

SIZES = (32, 64)
SHOWN = 5  # lines of a report, per kind of problem
MOST_BYTES, MOST_PIXELS = 100_000_000, 64_000_000  # of an image
MOST_CAPTION_BYTES, MOST_CAPTION = 1_000_000_000, 10_000  # of the CSV file; letters of a caption
MOST_NAME_BYTES = 255  # of each part of a path, on common file systems
SHOWN_LETTERS, SHOWN_COLUMNS = 80, 8  # of what a message quotes
MISSING, UNREADABLE = "the file is missing", "the file cannot be read as an image"
A_PROGRAM = "the file is PostScript, a program that would be run to draw the image"
NO_FILE = "the path is that of a folder or a device, not of a file"
OUTSIDE = "the file is outside the folder of the images (--allow-outside reads it)"
LONG_NAME = f"the image name has a part of more than {MOST_NAME_BYTES} bytes"
BAD_NAME = "the image name has a character that no name of a file has"
TOO_LARGE = f"the file has more than {MOST_BYTES:,} bytes"
TOO_MANY_PIXELS = f"the image has more than {MOST_PIXELS:,} pixels"
LONG_CAPTION = f"the caption has more than {MOST_CAPTION:,} letters"
NO_BYTES = "the image has values of more than 16 bits, which are not colours"
NO_IMAGE, NO_CAPTION = "the image name is empty", "the caption is empty"
TOO_LONG = "the row has more columns than the header: put captions with commas in quotes"
SEPARATORS = (",", ";", "\t")


@attrs.frozen(kw_only=True, eq=False)
class Pair:
    """An image and one of its captions.

    Attributes:
        name: the name of the image, as in the CSV file.
        image: uint8 [3, H, W].
        text: int64 [L], never empty.
    """

    name: str
    image: Tensor
    text: Tensor


@attrs.frozen
class Problem:
    """An unusable row.

    Attributes:
        line: the line of the CSV file on which the row ends.
        kind: the kind of problem, in words.
        detail: the wrong value.
    """

    line: int
    kind: str
    detail: str


@attrs.frozen
class Row:
    """A row of the CSV file.

    Attributes:
        line: the line on which the row ends.
        image: the file name of the image.
        caption: the caption.
        more: the values after the last column.
    """

    line: int
    image: str
    caption: str
    more: str


def read_pairs(
    images: Path,
    captions: Path,
    *,
    columns: tuple[str, str] = ("image", "caption"),
    size: int = 32,
    allow_outside: bool = False,
) -> tuple[list[Pair], list[Problem]]:
    """Read all pairs into memory, 3 * size * size bytes per image.

    Args:
        images: the folder of the images.
        captions: the CSV file, in UTF-8, whose first row names the columns; the separator is a
            comma, a semicolon or a tab.
        columns: the names of the image column and the caption column.
        size: the side of the images in pixels; they are cropped to a square at the centre.
        allow_outside: whether to read images outside the folder, by an absolute name, by `..` or by
            a symbolic link. A CSV file from somebody else could name any file of this machine.

    Returns:
        The pairs in the order of their rows, and the unusable rows.

    Raises:
        SystemExit: if the folder, the file or a column is missing, or the file is not a CSV file in
            UTF-8.
    """
    if not images.is_dir():
        raise SystemExit(f"--images must be a folder, got {images}. Check the path.")
    if not captions.is_file():
        raise SystemExit(f"--captions must be a file, got {captions}. Check the path.")
    pairs: list[Pair] = []
    problems: list[Problem] = []
    decoded: dict[str, Tensor | str] = {}
    for row in _rows(captions, columns):
        name = row.image
        if name and name not in decoded:
            problem = _problem_of_path(images, name, allow_outside=allow_outside)
            decoded[name] = problem or _decode(images / name, size)
        found = _pair_or_problem(row, decoded[name] if name else NO_IMAGE)
        if isinstance(found, Pair):
            pairs.append(found)
        else:
            problems.append(found)
    return pairs, problems


def _pair_or_problem(row: Row, image: Tensor | str) -> Pair | Problem:
    name, caption = _shortened(row.image), repr(_shortened(row.caption))
    if row.more:
        return Problem(row.line, TOO_LONG, f"{name}: {caption}, {_shortened(row.more)!r}")
    if isinstance(image, str):
        return Problem(row.line, image, name)
    if len(row.caption) > MOST_CAPTION:
        return Problem(row.line, LONG_CAPTION, f"{name}: {caption}")
    text = tokenize(row.caption)
    if not len(text):
        return Problem(row.line, NO_CAPTION, f"{name}: {caption}")
    return Pair(name=row.image, image=image, text=text)


def _shortened(text: str) -> str:
    """Return a text, or its beginning if it is too long for a message."""
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."


def _rows(path: Path, columns: tuple[str, str]) -> Iterator[Row]:
    text = _text(path)
    if text.lstrip()[:1] in {"{", "["}:
        raise SystemExit(
            f"{path} must be a CSV file, got what looks like JSON. Write one row per caption, with "
            f"the columns {columns[0]!r} and {columns[1]!r}."
        )
    begin = 1
    try:
        separator = _separator(text, columns)
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        _check_columns(path, rows.fieldnames or (), columns)
        begin = 2
        for row in rows:
            image, caption = ((row[column] or "").strip() for column in columns)
            yield Row(rows.line_num, image, caption, ", ".join(row.get(None) or ()))  # type: ignore[call-overload]
            begin = rows.line_num + 1
    except csv.Error as error:
        raise SystemExit(
            f"{path} must be a CSV file, got an invalid row from line {begin} ({error}). Look for "
            "an unclosed quotation mark; double those that are part of a caption in quotes."
        ) from error


def _check_columns(path: Path, there: Sequence[str], columns: tuple[str, str]) -> None:
    if not set(columns) <= set(there):
        raise SystemExit(
            f"{path} must have the columns {columns[0]!r} and {columns[1]!r}, got "
            f"{_listed(there) or 'an empty file'}. Name yours with --image-column and "
            "--caption-column."
        )


def _listed(columns: Sequence[str]) -> str:
    more = len(columns) - SHOWN_COLUMNS
    shown = ", ".join(repr(_shortened(column)) for column in columns[:SHOWN_COLUMNS])
    return f"{shown} and {more:,} more" if more > 0 else shown


def _text(path: Path) -> str:
    size = path.stat().st_size
    if size > MOST_CAPTION_BYTES:
        raise SystemExit(
            f"{path} must have at most {MOST_CAPTION_BYTES:,} bytes, got {size:,}. Split it, or "
            "raise MOST_CAPTION_BYTES."
        )
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SystemExit(
            f"{path} must be in UTF-8, got other bytes on line {line}. Save it as UTF-8."
        ) from error


def _separator(text: str, columns: tuple[str, str]) -> str:
    """Return the separator of the columns, determined from the first line."""
    first = text.splitlines()[:1]
    for separator in SEPARATORS:
        if set(columns) <= set(next(csv.reader(first, delimiter=separator), ())):
            return separator
    return SEPARATORS[0]


def _problem_of_path(folder: Path, name: str, *, allow_outside: bool) -> str | None:
    """Return why the file of an image must not or cannot be read; None if it may be tried."""
    if "\0" in name:
        return BAD_NAME
    if any(len(os.fsencode(part)) > MOST_NAME_BYTES for part in Path(name).parts):
        return LONG_NAME
    try:
        path = (folder / name).resolve()
        if not allow_outside and not path.is_relative_to(folder.resolve()):
            return OUTSIDE
        return _problem_of_file(path)
    except (OSError, RuntimeError) as error:  # no permission, or a loop of symbolic links
        return f"the file cannot be read: {getattr(error, 'strerror', None) or error}"


def _problem_of_file(path: Path) -> str | None:
    if not path.exists():
        return MISSING
    if not path.is_file():
        return NO_FILE
    return TOO_LARGE if path.stat().st_size > MOST_BYTES else None


def _decode(path: Path, size: int) -> Tensor | str:
    """Return an image as a square RGB tensor on white, or the problem with its file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = Image.open(path)  # reads the header alone
        with file:
            return _problem_of_image(file) or _pixels(file, size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return TOO_MANY_PIXELS
    except PermissionError as error:
        return f"the file cannot be read: {error.strerror}"
    # Pillow's exception depends on the format, and on where the file is broken: a decoder may raise
    # a RuntimeError, a NotImplementedError or an AttributeError as well.
    except Exception:  # noqa: BLE001
        return UNREADABLE


def _problem_of_image(file: Image.Image) -> str | None:
    if file.format == "EPS":
        return A_PROGRAM
    return TOO_MANY_PIXELS if file.width * file.height > MOST_PIXELS else None


def _pixels(file: Image.Image, size: int) -> Tensor | str:
    image = ImageOps.exif_transpose(file)
    if image.mode[0] in "IF":  # one value per pixel, which Pillow would clip at 255
        numbers = np.asarray(image)
        if image.mode == "F" or numbers.min() < 0 or numbers.max() > 65_535:
            return NO_BYTES
        image = Image.fromarray((numbers // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return to_tensor(ImageOps.fit(image.convert("RGB"), (size, size)))


def problem_report(problems: Sequence[Problem], usable: int) -> str:
    """Return a report of the unusable rows: their number, and the first ones of each kind."""
    lines = [f"{len(problems)} of {usable + len(problems)} rows cannot be used:"]
    for kind, count in Counter(problem.kind for problem in problems).most_common():
        lines.append(f"  {count}: {kind}")
        first = [problem for problem in problems if problem.kind == kind][:SHOWN]
        lines += [f"      line {problem.line}: {problem.detail}" for problem in first]
        lines += ["      ..."] * (count > SHOWN)
    return "\n".join(lines)


def split(pairs: Sequence[Pair], held_out: float) -> tuple[list[Pair], list[Pair]]:
    """Return the training pairs and the held-out pairs; all captions of an image are in one part.

    The choice depends only on the names of the images, not on the order of the rows.

    Args:
        pairs: all pairs.
        held_out: the share of images to hold out, in [0, 1).
    """
    names = sorted(
        {pair.name for pair in pairs}, key=lambda name: (zlib.crc32(name.encode()), name)
    )
    chosen = set(names[: round(held_out * len(names))])
    kept = [pair for pair in pairs if pair.name not in chosen]
    return kept, [pair for pair in pairs if pair.name in chosen]


class Pairs(Dataset[dict[str, Any]]):
    """A data set of pairs; all captions of an image have the same group."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        names = dict.fromkeys(pair.name for pair in pairs)
        self._groups = {name: group for group, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self._pairs[index]
        return {
            "image": pair.image,
            "text": pair.text,
            "group": self._groups[pair.name],
            "draws": torch.rand(NUMBER_OF_DRAWS),
        }


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return a training batch: augmented images [B, 3, H, W], texts and groups."""
    images = torch.stack([sample["image"] for sample in samples])
    draws = torch.stack([sample["draws"] for sample in samples])
    return {**evaluation_batch(samples), "image": augment(images, draws)}


def evaluation_batch(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return a batch with images [B, 3, H, W] in [0, 1], not augmented."""
    return {
        "image": torch.stack([sample["image"] for sample in samples]).float() / 255,
        "text": pad_sequence([sample["text"] for sample in samples], batch_first=True),
        "group": torch.tensor([sample["group"] for sample in samples]),
    }


def build_model(size: int) -> TwoTowers:
    """Return the towers of the emoji example, with one more convolution for 64 x 64 images."""
    model = TwoTowers()
    if size == 64:
        stem = model.encode_image.stem
        first = ScaledConv2d(3, stem.out_channels, 4, stride=2)
        second = ScaledConv2d(stem.out_channels, stem.out_channels, 4, stride=2)
        model.encode_image.stem = nn.Sequential(first, nn.GELU(), second)  # type: ignore[assignment]
    return model


def usable_pairs(flags: argparse.Namespace) -> list[Pair]:
    """Return the usable pairs, and report the unusable rows.

    Raises:
        SystemExit: if there are unusable rows, without --skip-broken; or if fewer than two images
            are left.
    """
    columns = (flags.image_column, flags.caption_column)
    pairs, problems = read_pairs(
        flags.images,
        flags.captions,
        columns=columns,
        size=flags.image_size,
        allow_outside=flags.allow_outside,
    )
    if problems:
        report = problem_report(problems, len(pairs))
        if not flags.skip_broken:
            raise SystemExit(f"{report}\nFix them, or skip them with --skip-broken.")
        if idist.get_rank() == 0:
            print(f"{report}\nThese rows are skipped.\n")
    images = len({pair.name for pair in pairs})
    if images < 2:
        raise SystemExit(f"{flags.captions} must name at least 2 usable images, got {images}.")
    return pairs


def main(arguments: Sequence[str] | None = None) -> Trainer:
    """Check the data, train, and return the trainer."""
    flags = parse_flags(arguments)
    train, held_out = (Pairs(part) for part in split(usable_pairs(flags), flags.held_out))
    batch_size = min(flags.batch_size, len(train))
    loader = SeededLoader(train, batch_size, seed=flags.seed, drop_last=True, collate=collate)

    torch.manual_seed(flags.seed)
    model, loss = build_model(flags.image_size), get_loss(flags.loss)
    groups = parameter_groups(model, weight_decay=0.01, lr=flags.learning_rate, loss=loss)
    trainer = Trainer(
        model,
        loss,
        torch.optim.AdamW(groups, betas=(0.9, 0.98)),
        task=tasks.image_text,
        precision=flags.precision,
        microbatch_size=flags.microbatch_size,
        seed=flags.seed,
        log_every=min(50, len(loader)),
    )
    steps = len(loader) * flags.epochs
    trainer.attach(LearningRate(warmup=steps // 10, decay="cosine"), GradientClipping(max_norm=1.0))
    if len(held_out):
        samples = [held_out[index] for index in range(len(held_out))]
        pieces = [samples[start : start + 256] for start in range(0, len(samples), 256)]
        batches = of_this_rank([evaluation_batch(piece) for piece in pieces])
        trainer.attach(Evaluation(batches, metrics=[RetrievalRecall(k=(1, 5, 10))]))
    run_dir = flags.run_dir or new_run("runs", "own_data")
    best = "val/recall@1" if len(held_out) else None
    trainer.attach(*default_handlers(run_dir, best=best))
    if idist.get_rank() == 0:
        print(f"{len(train)} pairs to train on, {len(held_out)} held out; run: {run_dir}")
    trainer.run(loader, max_epochs=flags.epochs)
    return trainer


def parse_flags(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(
        description="Train an image-text model on your own images and captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder of the images")
    add("--captions", type=Path, required=True, help="CSV file with one row per caption")
    add("--image-column", default="image", help="column with the images' file names")
    add("--caption-column", default="caption", help="column with the captions")
    add("--skip-broken", action="store_true", help="skip unusable rows")
    add("--allow-outside", action="store_true", help="read images outside the folder, too")
    add("--image-size", type=int, choices=SIZES, default=32, help="side of the images in pixels")
    add("--held-out", type=_share, default=0.1, help="share of images to evaluate on")
    add("--epochs", type=int, default=30, help="passes over the training pairs")
    add("--batch-size", type=int, default=256, help="pairs per update")
    add("--microbatch-size", type=int, help="pairs that go through the model at once")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="model's precision")
    add("--learning-rate", type=float, default=2e-3, help="learning rate after warm-up")
    add("--loss", default="clip", help="name of a contrastive loss")
    add("--run-dir", type=Path, help="run directory to resume; default: a new one")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    return parser.parse_args(arguments)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


if __name__ == "__main__":
    with process_group():
        main()
