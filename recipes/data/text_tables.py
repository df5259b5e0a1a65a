"""Captions in text files: CSV, TSV, and the layouts of Flickr8k and Flickr30k."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any

import attrs

from diptych.recipes.data.rows import (
    DataError,
    Listing,
    Problem,
    Row,
    listing,
    shortened,
    split_named,
    split_of,
)

IMAGE = (
    *("image", "file_name", "filename", "filepath", "image_name", "image_path", "image_file"),
    *("file", "path", "img", "photo", "picture", "name", "url", "image_url", "coco_url"),
)
CAPTION = (
    *("caption", "text", "title", "comment", "description", "sentence", "raw", "alt", "prompt"),
    *("captions", "texts", "sentences"),
)
LABEL = ("label", "class", "category")
"""Names of columns, in the order in which they are looked for."""
SUFFIXES = frozenset(
    [
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
        *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    ]
)
"""The suffixes of image files, in lower case."""
TOO_LONG = "the row has more columns than the first one: put captions with a {} in quotes"
TOO_SHORT = "the row has fewer columns than the file's other rows"
SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "bar"}
TOKENS = re.compile(r"(?P<image>[^\t]+)#\d+\t(?P<caption>.*)")
"""A line of Flickr8k.token.txt: `1000268201_693b08cb0e.jpg#0<TAB>A child in a pink dress ...`."""
SEPARATOR = re.compile(r'"?sep=([\t,;|])"?', re.IGNORECASE)
"""The first line in which Excel names the separator: `sep=;`."""
NUMBER = re.compile(r"[\W_]*\d+\W*$")
"""The number of one of several columns of captions: `caption_1`, `captions[0]`."""
LEADING = re.compile(r"[ \t]*(#[^\r\n]*)?(\r\n|\n|\r)")
"""An empty line, or one that may be a comment."""
BAR = re.compile(r"\s*\|\s*")
LISTED = re.compile(r"\s*\[\s*[\"']")
"""The beginning of a list of texts."""
COLUMNS = 8
"""The most columns that a message lists."""
LINES = 100
"""The most lines of a caption in quotes, so that a stray quotation mark costs little."""

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
        captions: those of the captions.
    """

    separator: str
    header: bool
    width: int
    image: int
    captions: Sequence[int] = ()
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
    first = _first(path, text)
    named = SEPARATOR.fullmatch(first)
    if named:
        text = text.replace(first, "", 1)  # the other lines keep their numbers
        first = _first(path, text)
    if columns == (None, None):
        if TOKENS.fullmatch(first):
            return listing("Flickr8k.token.txt", _token_rows(path, text))
        if "".join(first.split()).lower() == "image_name|comment_number|comment":
            return listing("Flickr30k results.csv", _bar_rows(path, text))
    form = _form(path, first, columns, named[1] if named else SEPARATORS)
    read = _tabbed if form.separator == "\t" else _quoted
    found = (row for cells in read(path, text, form) for row in _rows(form, *cells))
    return listing(form.layout, found)


def _first(path: Path, text: str) -> str:
    return next((line for _, line in lines_of(path, text)), "")


def without_comments(text: str, columns: Columns) -> str:
    """Return a text with empty lines in place of the comments (`# ...`) at its beginning.

    A header may begin with "#", and so may the name of an image.
    """
    position, count = 0, 0
    while (match := LEADING.match(text, position)) and _is_comment(match[1] or "", columns):
        position, count = match.end(), count + 1
    return "\n" * count + text[position:]


def _is_comment(line: str, columns: Columns) -> bool:
    if any(_with_header(separator, _cells(line, separator), columns) for separator in SEPARATORS):
        return False
    names_image = any(suffix in line.lower() for suffix in SUFFIXES)
    return line[1:2] in {"", " ", "\t", "#"} or not names_image


def is_image_name(name: str) -> bool:
    """Return whether a name ends as the names of images do."""
    return PureWindowsPath(name.strip()).suffix.lower() in SUFFIXES


def _token_rows(path: Path, text: str) -> Iterator[Row | Problem]:
    for where, line in lines_of(path, text):
        match = TOKENS.fullmatch(line)
        if match is None:
            yield Problem(
                where, "the line is not name#number, a tab and a caption", shortened(line)
            )
        else:
            yield Row(where, match["image"], match["caption"].strip())


def _bar_rows(path: Path, text: str) -> Iterator[Row | Problem]:
    for where, line in [*lines_of(path, text)][1:]:
        name, *rest = BAR.split(line.strip(), maxsplit=2)
        if len(rest) == 2:
            yield Row(where, name, rest[1])
        else:
            yield Problem(where, TOO_SHORT, shortened(line))


def lines_of(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each line that is not empty."""
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if line.strip():
            yield f"{path.name}:{number}", line


def _form(path: Path, first: str, columns: Columns, separators: Iterable[str]) -> _Form:
    """Recognise the columns from the first line.

    Raises:
        DataError: if there is no column of images, or none that a flag has named.
    """
    split_up = {separator: _cells(first, separator) for separator in separators}
    for separator, cells in split_up.items():
        form = _with_header(separator, cells, columns)
        if form is not None:
            return form
    if columns == (None, None):
        for separator, cells in split_up.items():
            form = _without_header(path, separator, cells)
            if form is not None:
                return form
    there = max(split_up.values(), key=len) if first.strip() else []
    asked = " and ".join(filter(None, columns))
    raise DataError(
        f"{path} must have {asked or 'a column of image names and one of captions'}, got "
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
    names = [plain_name(cell.strip().lstrip("# ").strip('"')) for cell in cells]

    def index(asked: str | None, known: Sequence[str]) -> int | None:
        wanted = known if asked is None else [plain_name(asked)]
        return next((names.index(name) for name in wanted if name in names), None)

    image, label = index(columns[0], IMAGE), index(None, LABEL)
    captions = caption_columns(names, columns[1])
    if image is None or not (captions or (label is not None and columns[1] is None)):
        return None
    return _Form(separator, True, len(cells), image, captions, label, index(None, ("split",)))


def plain_name(column: str) -> str:
    """Return the name of a column as it is looked up: `File Name` is `file_name`."""
    return "_".join(column.lower().split())


def caption_columns(names: Sequence[str], asked: str | None) -> list[int]:
    """Return the indices of the columns of captions: of one, or of `caption_1`, `caption_2`, ...

    Args:
        names: of the columns.
        asked: the name that a flag has; None: the first known one.
    """
    names = [plain_name(name) for name in names]
    if asked and plain_name(asked) in names:
        return [names.index(plain_name(asked))]
    bases = [NUMBER.sub("", name) for name in names]
    wanted = CAPTION if asked is None else [plain_name(asked)]
    name = next((name for name in wanted if name in bases), None)
    return [index for index, base in enumerate(bases) if base == name]


def _without_header(path: Path, separator: str, cells: Sequence[str]) -> _Form | None:
    """Return the form of a file whose first line names an image and has a caption.

    Raises:
        DataError: if several columns, or none, may be the captions.
    """
    image = next((index for index, cell in enumerate(cells) if is_image_name(cell)), None)
    if len(cells) < 2 or image is None:
        return None
    said, split = [index for index in range(len(cells)) if index != image], None
    if len(said) > 1:
        split = next((index for index in said if split_named(cells[index])), None)
        # Numbers count the captions, or the rows.
        said = [i for i in said if i != split and not cells[i].strip().isdecimal()]
    if len(said) != 1:
        raise DataError(
            f"{path} must name its columns in the first line (image,caption), or have a name and a "
            f"caption in each, got {_listed(cells)}. Put captions with a "
            f"{SEPARATORS[separator]} in quotes."
        )
    return _Form(separator, False, len(cells), image, said, split=split)


def _tabbed(path: Path, text: str, form: _Form) -> Iterator[tuple[str, list[str]]]:
    """Yield the cells of lines separated by tabs; quotes count only around a whole cell."""
    lines = list(lines_of(path, text))
    number = int(form.header)
    while number < len(lines):
        where, line = lines[number]
        cells, read = line.split("\t"), 1
        if any(cell.startswith('"') for cell in cells):
            following = [one for _, one in lines[number : number + LINES]]
            cells, read = _in_quotes(following, form.width) or (cells, 1)
        yield where, cells
        number += read


def _in_quotes(lines: Sequence[str], width: int) -> tuple[list[str], int] | None:
    """Return the cells of a record with cells in quotes, and its lines; None if it is none.

    A record has at most one line that looks like a whole record: `"` may begin a caption too.
    """
    reader = csv.reader((f"{line}\n" for line in lines), delimiter="\t", strict=True)
    with suppress(csv.Error):
        cells, read = next(reader), reader.line_num
        whole = sum(line.count("\t") == width - 1 for line in lines[:read])
        if len(cells) <= width and whole <= 1:
            return cells, read
    return None


def _quoted(path: Path, text: str, form: _Form) -> Iterator[tuple[str, list[str]]]:
    """Yield the cells of a CSV file.

    Raises:
        DataError: if a row is no CSV.
    """
    begin, is_header = 1, form.header
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=form.separator,
        strict=True,
        skipinitialspace=f"{form.separator} " in _first(path, text),
    )
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


def _rows(form: _Form, where: str, cells: Sequence[str]) -> Iterator[Row | Problem]:
    """Yield a row for each caption of a line."""

    def cell(index: int | None) -> str:
        return "" if index is None or index >= len(cells) else cells[index].strip()

    if len(cells) > form.width:
        kind = TOO_LONG.format(SEPARATORS[form.separator])
        yield Problem(where, kind, shortened(", ".join(cells)))
    elif len(cells) <= max(form.image, *form.captions[:1], 0):
        yield Problem(where, TOO_SHORT, shortened(form.separator.join(cells)))
    else:
        split = split_of(cell(form.split))
        for text in [one for one in map(cell, form.captions) if one] or [""]:
            for caption in captions_in(text):
                yield Row(where, cell(form.image), caption, cell(form.label), split)


def captions_in(value: Any) -> list[Any]:
    """Return the captions in a cell or an entry: one, or those of a list.

    A cell may have a list as JSON or Python writes it: `["a cat", "a black cat"]`.
    """
    if isinstance(value, str) and LISTED.match(value):
        value = _parsed(value)
    return (value or [""]) if isinstance(value, list) else [value]


def _parsed(text: str) -> Any:
    """Return the list of texts that a text shows; the text itself if it shows none."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = parse(text)
            if isinstance(found, list) and all(isinstance(one, str) for one in found):
                return found
    return text


def _listed(columns: Sequence[str]) -> str:
    more = len(columns) - COLUMNS
    shown = ", ".join(repr(shortened(column)) for column in columns[:COLUMNS])
    return f"{shown} and {more:,} more" if more > 0 else shown
