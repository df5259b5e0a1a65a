"""The table of a user's images: rows with their files, the parts of the data, and a summary."""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs

from diptych.engine.distributed.agreement import on_rank_zero
from diptych.engine.distributed.collectives import rank
from diptych.recipes.data.captions import read_captions, read_folder
from diptych.recipes.data.image_files import ImageFolder, unreadable
from diptych.recipes.data.rows import (
    SPLITS,
    DataError,
    Listing,
    Problem,
    Row,
    problem_report,
    shortened,
)
from diptych.recipes.data.text_tables import Columns
from diptych.recipes.settings import Settings, TaskName

MOST_LETTERS = 10_000
"""The longest caption that is read."""
NO_CAPTION = "the caption is empty"
LONG_CAPTION = f"the caption has more than {MOST_LETTERS:,} letters"
NEITHER = "the image has no caption: name their file with --captions"
NO_SPLIT = f"the split must be one of {', '.join(SPLITS)}, or empty"
NO_CLASS = "the image has no class: put it into a folder, or name its label"


@attrs.frozen
class ImageRow:
    """A row that can be used.

    Attributes:
        name: the name of the image, relative to the folder.
        path: its file.
        caption: the caption; for an image in a folder by class, the name of the class.
        label: the class; empty if there is none.
        split: "train", "val", "test", or empty.
        group: rows of one group match one another: those of the images with the same captions,
            which no model could tell apart; for most images, their own captions alone.
    """

    name: str
    path: Path
    caption: str
    label: str
    split: str
    group: str

    @property
    def has_caption(self) -> bool:
        """Whether the caption is more than the name of the class."""
        return self.caption not in {"", _spoken(self.label)}


@attrs.frozen
class ImageTable:
    """The rows of a user's data.

    Attributes:
        source: the file or the folder.
        layout: the name of its layout.
        rows: the rows that can be used.
        problems: those that cannot.
    """

    source: Path
    layout: str
    rows: tuple[ImageRow, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def images(self) -> int:
        """The number of different images."""
        return len({row.path for row in self.rows})

    @property
    def classes(self) -> list[str]:
        """The names of the classes, sorted."""
        return sorted({row.label for row in self.rows if row.label})

    def parts(self, held_out: float) -> dict[str, list[ImageRow]]:
        """Return the rows to train on, those to evaluate on, and those left alone.

        The parts are those that the data name. Without a part to evaluate on, a share of the images
        is held out, chosen by their names, with all of their captions.

        Args:
            held_out: the share, in [0, 1).
        """
        parts = {part: [r for r in self.rows if r.split == part] for part in ("val", "test")}
        train = [row for row in self.rows if row.split in {"", "train"}]
        if not parts["val"]:
            names = sorted(
                {r.name for r in train}, key=lambda name: (zlib.crc32(os.fsencode(name)), name)
            )
            chosen = set(names[: round(held_out * len(names))])
            parts["val"] = [row for row in train if row.name in chosen]
            train = [row for row in train if row.name not in chosen]
        return {"train": train, **parts}

    def summary(self, held_out: float) -> str:
        """Return a short table: the layout, rows, images, parts, and what is skipped and why."""
        parts = self.parts(held_out)
        captions = sum(bool(row.caption) for row in self.rows)
        lines = [f"{self.source} ({self.layout})"]
        numbers = {
            "rows": len(self.rows) + len(self.problems),
            "images": self.images,
            "captions an image": f"{captions / max(1, self.images):.1f}",
            "classes": len(self.classes),
            "to train on": len(parts["train"]),
            "held out": len(parts["val"]),
            "for a test": len(parts["test"]),
            "skipped": len(self.problems),
        }
        for name, number in numbers.items():
            if number not in {0, "0.0"}:
                text = f"{number:,}" if isinstance(number, int) else number
                lines.append(f"  {name:17}  {text:>12}")
        if self.problems:
            lines.append(problem_report(self.problems, len(self.rows)))
        return "\n".join(lines)


def read_table(settings: Settings) -> ImageTable:
    """Read the rows of a folder of images and its captions; every row is checked.

    Raises:
        DataError: if the folder or the file cannot be read; if rows cannot be used, unless
            `skip_broken` is set; or if fewer than two images are left.
    """
    found = on_rank_zero(lambda: _table_or_error(settings))
    if not isinstance(found, DataError):
        return found
    if rank() == 0:
        raise found
    raise DataError("the data cannot be used, for the reason that rank 0 reports")


def image_rows(
    images: Path,
    captions: Path | None = None,
    *,
    task: TaskName = "image_text",
    columns: Columns = (None, None),
    allow_outside: bool = False,
    decode: Callable[[Sequence[Path]], dict[Path, str]] | None = None,
) -> ImageTable:
    """Return the usable and the unusable rows of a folder of images.

    Args:
        images: the folder.
        captions: the file of captions, or a folder of a text file for each image; None: metadata or
            text files in the folder, or the folder's images.
        task: what a row needs: a caption, a class, or neither.
        columns: the names of the image column and the caption column; None: recognised.
        allow_outside: whether a name may lead out of the folder.
        decode: returns the problems of files; None: the files are not opened.

    Raises:
        DataError: if the folder or the file cannot be read.
    """
    listed = _listed(images, captions, columns, task)
    found = ImageFolder(images, allow_outside).find(row.image for row in listed.rows)
    files = [path for path in found.values() if isinstance(path, Path)]
    damaged = {} if decode is None else decode(files)
    groups = _groups(listed.rows, found)
    problems, rows = list(listed.problems), list[ImageRow]()
    for row in listed.rows:
        path = found[row.image]
        kind = path if isinstance(path, str) else damaged.get(path) or _problem(row, task, captions)
        if isinstance(path, Path) and kind is None:
            rows.append(_usable(row, path, images, groups[path]))
        else:
            problems.append(Problem(row.where, str(kind), _detail(row)))
    return ImageTable(captions or images, listed.layout, tuple(rows), tuple(problems))


def _listed(images: Path, captions: Path | None, columns: Columns, task: TaskName) -> Listing:
    if not images.is_dir():
        raise DataError(f"--images must be a folder, got {images}. Check the path.")
    if captions is None:
        texts = images if task == "image_text" else None
        listed = read_folder(images, columns=columns, texts=texts)
        if not listed.rows and not listed.problems:
            raise DataError(f"--images must have images in it, got {images}, which has none.")
        return listed
    if captions.is_dir():
        listed = read_folder(images, texts=captions)
        if not any(row.caption for row in listed.rows):
            raise DataError(
                "--captions must be a file, or a folder with a text file for each image (a.txt for "
                f"a.jpg), got {captions}, which has none. Check the path."
            )
        return listed
    if not captions.is_file():
        raise DataError(f"--captions must be a file, got {captions}. Check the path.")
    return read_captions(captions, columns=columns)


def _table_or_error(settings: Settings) -> ImageTable | DataError:
    try:
        return _read(settings)
    except DataError as error:
        return error


def _read(settings: Settings) -> ImageTable:
    if settings.images is None:
        raise DataError("--images must be a folder, got none. Name the folder of your images.")
    size, workers = settings.image_size or 1, settings.workers
    decodes = settings.check == "decode"
    table = image_rows(
        settings.images,
        settings.captions,
        task=settings.task,
        columns=(settings.image_column, settings.caption_column),
        allow_outside=settings.allow_outside,
        decode=(lambda paths: unreadable(paths, size, workers=workers)) if decodes else None,
    )
    if table.problems and not settings.skip_broken:
        report = problem_report(table.problems, len(table.rows))
        raise DataError(f"{report}\nFix them, or skip them with --skip-broken.")
    if table.images < 2:
        raise DataError(f"{table.source} must name at least 2 usable images, got {table.images}.")
    return table


def _problem(row: Row, task: TaskName, captions: Path | None) -> str | None:
    if row.split and row.split not in SPLITS:
        return NO_SPLIT
    if task == "classification":
        return None if row.label else NO_CLASS
    if task == "two_views":
        return None
    if len(row.caption) > MOST_LETTERS:
        return LONG_CAPTION
    if row.caption.strip() or row.label:
        return None
    return NEITHER if captions is None else NO_CAPTION


def _detail(row: Row) -> str:
    return (
        f"{shortened(row.image)}: {shortened(row.caption)!r}"
        if row.caption
        else shortened(row.image)
    )


def _usable(row: Row, path: Path, images: Path, group: str) -> ImageRow:
    # One name for each image, whichever way the file writes it.
    name = Path(os.path.relpath(path, images)).as_posix()
    return ImageRow(name, path, _caption(row), row.label, row.split, group)


def _groups(rows: Sequence[Row], found: Mapping[str, Path | str]) -> dict[Path, str]:
    """Return the group of each file: all of its captions."""
    captions: dict[Path, set[str]] = defaultdict(set)
    for row in rows:
        path = found[row.image]
        if isinstance(path, Path):
            captions[Path(os.path.normpath(path))].add(_caption(row))
    files = {path for path in found.values() if isinstance(path, Path)}
    return {path: "\n".join(sorted(captions[Path(os.path.normpath(path))])) for path in files}


def _caption(row: Row) -> str:
    return row.caption.strip() or _spoken(row.label)


def _spoken(label: str) -> str:
    return label.replace("_", " ")
