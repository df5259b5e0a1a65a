"""Captions in text files: CSV, TSV, and the layouts of Flickr8k and Flickr30k."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath

import attrs

from diptych.recipes.data.rows import (
    DataError,
    Listing,
    Problem,
    Row,
    listing,
    shortened,
    split_named,
)

IMAGE = (
    *("image", "file_name", "filename", "filepath", "image_name", "image_path", "image_file"),
    *("file", "path", "img", "photo", "picture", "name"),
)
CAPTION = ("caption", "text", "title", "comment", "description", "sentence", "raw", "alt")
LABEL = ("label", "class", "category")
"""Names of columns, in the order in which they are looked for."""
SUFFIXES = frozenset(
    [
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
        *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    ]
)
"""The suffixes of image files, in lower case."""
TOO_LONG = "the row has more columns than the header: put captions with commas in quotes"
TOO_SHORT = "the row has fewer columns than the file's other rows"
SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
TOKENS = re.compile(r"(?P<image>[^\t]+)#\d+\t(?P<caption>.*)")
"""A line of Flickr8k.token.txt: `1000268201_693b08cb0e.jpg#0<TAB>A child in a pink dress ...`."""
BARS = "| "
COLUMNS = 8
"""The most columns that a message lists."""

Columns = tuple[str | None, str | None]
"""The names of the image column and the caption column; None: recognised."""


@attrs.frozen
class _Form:
    """How a text file separates its columns, and which they are.

    Attributes:
        separator: between columns.
        header: whether the first line names the columns.
        width: the number of columns of the first line.
        image: the index of the image's column; the others may be missing.
    """

    separator: str
    header: bool
    width: int
    image: int
    caption: int | None = None
    label: int | None = None
    split: int | None = None

    @property
    def layout(self) -> str:
        """The name of the layout, for the summary."""
        kind = f"{SEPARATORS[self.separator]}-separated"
        return f"{kind} with a header" if self.header else f"{kind} without a header"


def read_text(path: Path, text: str, columns: Columns) -> Listing:
    """Return the rows of a text file.

    Raises:
        DataError: if it has no columns of images and captions, or is not valid CSV.
    """
    first = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    if columns == (None, None):
        if TOKENS.fullmatch(first):
            return listing("Flickr8k.token.txt", _token_rows(path, text))
        if "".join(first.split()).lower() == "image_name|comment_number|comment":
            return listing("Flickr30k results.csv", _bar_rows(path, text))
    form = _form(path, first, columns)
    read = _tabbed if form.separator == "\t" else _quoted
    return listing(form.layout, (_row(form, *found) for found in read(path, text, form)))


def is_image_name(name: str) -> bool:
    """Return whether a name ends as the names of images do."""
    return PureWindowsPath(name.strip()).suffix.lower() in SUFFIXES


def _token_rows(path: Path, text: str) -> Iterator[Row | Problem]:
    for where, line in _lines(path, text):
        match = TOKENS.fullmatch(line)
        if match is None:
            yield Problem(
                where, "the line is not name#number, a tab and a caption", shortened(line)
            )
        else:
            yield Row(where, match["image"], match["caption"].strip())


def _bar_rows(path: Path, text: str) -> Iterator[Row | Problem]:
    for where, line in [*_lines(path, text)][1:]:
        name, *rest = (part.strip() for part in line.split(BARS, 2))
        if len(rest) == 2:
            yield Row(where, name, rest[1])
        else:
            yield Problem(where, TOO_SHORT, shortened(line))


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each line that is not empty."""
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if line.strip():
            yield f"{path.name}:{number}", line


def _form(path: Path, first: str, columns: Columns) -> _Form:
    """Recognise the columns from the first line.

    Raises:
        DataError: if there is no column of images, or none that a flag has named.
    """
    split_up = {separator: _cells(first, separator) for separator in SEPARATORS}
    for separator, cells in split_up.items():
        form = _with_header(separator, cells, columns)
        if form is not None:
            return form
    if columns == (None, None):
        for separator, cells in split_up.items():
            form = _without_header(separator, cells)
            if form is not None:
                return form
    there = max(split_up.values(), key=len) if first.strip() else []
    raise DataError(
        f"{path} must have a column of image names and one of captions, got "
        f"{_listed(there) or 'an empty first line'}. Name yours with --image-column and "
        "--caption-column."
    )


def _cells(line: str, separator: str) -> list[str]:
    if separator == "\t":
        return line.split("\t")
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []


def _with_header(separator: str, cells: Sequence[str], columns: Columns) -> _Form | None:
    names = [cell.strip().strip('"').lower() for cell in cells]

    def index(asked: str | None, known: Sequence[str]) -> int | None:
        wanted = known if asked is None else [asked.strip().lower()]
        return next((names.index(name) for name in wanted if name in names), None)

    image, caption = index(columns[0], IMAGE), index(columns[1], CAPTION)
    label = index(None, LABEL)
    said = caption if columns[1] or label is None else label
    if image is None or said is None:
        return None
    return _Form(separator, True, len(cells), image, caption, label, index(None, ("split",)))


def _without_header(separator: str, cells: Sequence[str]) -> _Form | None:
    """Return the form of a file whose first line names an image and has a caption."""
    images = [index for index, cell in enumerate(cells[:2]) if is_image_name(cell)]
    if len(cells) < 2 or not images:
        return None
    image = images[0]
    return _Form(separator, False, len(cells), image, caption=1 - image)


def _tabbed(path: Path, text: str, form: _Form) -> Iterator[tuple[str, list[str]]]:
    r"""Yield the cells of lines separated by tabs; quotes count only around a whole cell."""
    for number, (where, line) in enumerate(_lines(path, text)):
        if number or not form.header:
            yield where, [_unquoted(cell) for cell in line.split(form.separator)]


def _unquoted(cell: str) -> str:
    """Return a cell without the quotation marks that a program has put around it."""
    inner = cell.strip()[1:-1]
    quoted = len(cell.strip()) > 1 and cell.strip()[0] == cell.strip()[-1] == '"'
    return inner.replace('""', '"') if quoted and '"' not in inner.replace('""', "") else cell


def _quoted(path: Path, text: str, form: _Form) -> Iterator[tuple[str, list[str]]]:
    """Yield the cells of a CSV file.

    Raises:
        DataError: if a row is no CSV.
    """
    begin, is_header = 1, form.header
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=form.separator, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if not is_header:
                    yield f"{path.name}:{reader.line_num}", cells
                is_header = False
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path} must be a CSV file, got an invalid row from line {begin} "
            f"({shortened(error)}). Look for an unclosed quotation mark; double those that are "
            "part of a caption in quotes."
        ) from error


def _row(form: _Form, where: str, cells: Sequence[str]) -> Row | Problem:
    def cell(index: int | None) -> str:
        return "" if index is None or index >= len(cells) else cells[index].strip()

    if len(cells) > form.width:
        return Problem(where, TOO_LONG, shortened(", ".join(cells)))
    if len(cells) <= max(form.image, form.caption or 0):
        return Problem(where, TOO_SHORT, shortened(form.separator.join(cells)))
    split = split_named(cell(form.split))
    return Row(where, cell(form.image), cell(form.caption), cell(form.label), split)


def _listed(columns: Sequence[str]) -> str:
    more = len(columns) - COLUMNS
    shown = ", ".join(repr(shortened(column)) for column in columns[:COLUMNS])
    return f"{shown} and {more:,} more" if more > 0 else shown
