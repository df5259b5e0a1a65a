"""Reads the captions of images, in the layouts that people have, recognised by content."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from diptych.recipes.data.json_captions import read_json
from diptych.recipes.data.rows import DataError, Listing, Problem, Row, listing, split_named
from diptych.recipes.data.text_tables import Columns, is_image_name, read_text, without_comments

MOST_BYTES = 1_000_000_000
"""The largest caption file that is read."""
BESIDE, BESIDE_SUFFIXES = "images with text files", (".txt", ".caption")
"""A layout, and the suffixes of its text files."""
BINARY = {
    b"PAR1": "a Parquet file. Write it as CSV, with pandas.read_parquet(FILE).to_csv(OTHER)",
    b"PK\x03\x04": "an Excel file or a zip archive. Save it as CSV, or unpack it",
    b"\x1f\x8b": "a gzip archive. Unpack it",
    b"SQLite format 3\0": "a database of SQLite. Write its table as CSV",
}
"""What some files are that are not text, by their first bytes, and the way out."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""The files in a folder of images that list its captions, as in Hugging Face's imagefolder."""


def read_captions(path: Path, *, columns: Columns = (None, None)) -> Listing:
    """Return the rows of a file of captions.

    The layout is recognised by the content, whatever the file's name: COCO's `captions_*.json`,
    Karpathy's `dataset_*.json`, records in JSON or JSON lines, captions by image, Flickr8k's
    `captions.txt` and `Flickr8k.token.txt`, Flickr30k's `results.csv`, and CSV, TSV and
    semicolon-separated files with or without a header. UTF-8, UTF-16 and UTF-32 are read, with any
    line ends; comments (`# ...`) at the beginning are not.

    Args:
        path: the file.
        columns: the names of the image column and the caption column; None: recognised.

    Raises:
        DataError: if the file cannot be read, or its layout is unknown.
    """
    text = without_comments(decoded(path), columns)
    if text.lstrip()[:1] in {"{", "["}:
        return read_json(path, text, columns)
    return read_text(path, text, columns)


def read_folder(
    folder: Path, *, columns: Columns = (None, None), texts: Path | None = None
) -> Listing:
    """Return the rows of a folder of images.

    If the folder, or each of its parts such as `train/` and `test/`, has a `metadata.jsonl` or
    `metadata.csv`, the rows are those of the file. Otherwise they are the images themselves; an
    image in a subfolder has the subfolder's name as its label, and each line of its text file
    (`a.txt` for `a.jpg`) as a caption.

    Args:
        folder: the folder.
        columns: the names of the columns of metadata; None: recognised.
        texts: the folder of the text files, which lie in it as the images in theirs; None: they
            are not read.

    Raises:
        DataError: if a file of metadata or a text file cannot be read.
    """
    parts = {folder: "", **{p: split_named(p.name) for p in _subfolders(folder)}}
    described = {
        part / name: split
        for part, split in parts.items()
        for name in METADATA
        if (part / name).is_file()
    }
    if described and texts in {None, folder}:
        return _of_metadata(folder, described, columns)
    found = list(images_in(folder) if texts is None else _with_texts(images_in(folder), texts))
    if any(row.caption for row in found):
        # A folder such as `00012` is no class: an image without a text would be called so.
        return listing(BESIDE, (attrs.evolve(row, label="") for row in found))
    return listing("images in folders by class", found)


def _with_texts(rows: Iterable[Row], texts: Path) -> Iterator[Row]:
    """Yield the rows of images with the captions in their text files."""
    for row in rows:
        files = (texts / Path(row.image).with_suffix(suffix) for suffix in BESIDE_SUFFIXES)
        file = next(filter(Path.is_file, files), None)
        lines = [] if file is None else [line.strip() for line in decoded(file).splitlines()]
        # Numbers alone are boxes, as YOLO writes them.
        for caption in [one for one in lines if any(map(str.isalpha, one))] or [""]:
            yield attrs.evolve(row, caption=caption)


def _of_metadata(folder: Path, files: dict[Path, str], columns: Columns) -> Listing:
    twice = [path for path in files if path.suffix != ".csv" and path.with_suffix(".csv") in files]
    if twice:
        raise DataError(
            f"{twice[0].parent} must have one file of metadata, got {twice[0].name} and "
            "metadata.csv. Name one of them with --captions."
        )
    found: list[Row | Problem] = []
    for path, split in files.items():
        one, inside = read_captions(path, columns=columns), path.parent.relative_to(folder)
        found += one.problems
        for row in one.rows:
            name = (inside / row.image).as_posix()
            where = (inside / row.where).as_posix()
            part = row.split or split
            found.append(attrs.evolve(row, where=where, image=name, split=part))
    return listing("imagefolder with metadata", found)


def images_in(folder: Path) -> Iterator[Row]:
    """Yield the images below a folder that are not hidden; their folder is their class."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith((".", "__MACOSX")) for part in name.parts)
        if is_image_name(path.name) and not hidden and path.is_file():
            parents = list(name.parts[:-1])
            split = split_named(parents[0]) if parents else ""
            inner = parents[1:] if split else parents
            # The bytes of a folder's name may be no text, which a label is.
            label = os.fsencode(inner[0]).decode(errors="replace") if inner else ""
            yield Row(name.as_posix(), name.as_posix(), "", label, split)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def decoded(path: Path) -> str:
    """Return the text of a file, in UTF-8, UTF-16 or UTF-32.

    Raises:
        DataError: if it is too large, cannot be read, or is in another encoding.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MOST_BYTES else b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}. Check the path.") from error
    if size > MOST_BYTES:
        raise DataError(f"{path} must have at most {MOST_BYTES:,} bytes, got {size:,}. Split it.")
    if data[257:262] == b"ustar":
        raise DataError(f"{path} must be text, got a tar archive. Pass shards with --shards.")
    for first, kind in BINARY.items():
        if data.startswith(first):
            raise DataError(f"{path} must be text, got {kind}.")
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} must be in UTF-8, UTF-16 or UTF-32, got other bytes on line {line}. Save "
            "it as UTF-8."
        ) from error
