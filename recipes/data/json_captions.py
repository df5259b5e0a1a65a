"""Captions in JSON: COCO, Karpathy's splits, lists of records, and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from diptych.recipes.data.rows import (
    DataError,
    Listing,
    Problem,
    Row,
    listing,
    shortened,
    split_named,
)
from diptych.recipes.data.text_tables import CAPTION, IMAGE, LABEL, Columns

NO_IMAGE = "the entry names no image of the file"
NO_RECORD = "the entry is no record with an image and a caption"


def read_json(path: Path, text: str, columns: Columns) -> Listing:
    """Return the rows of a file in JSON or JSON lines.

    Raises:
        DataError: if it is not valid, or of no known layout.
    """
    try:
        whole = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{path} must be JSON of captions, got lists too deep.") from error
    except ValueError as error:
        first = text.lstrip().partition("\n")[0].strip()
        if first.startswith("{") and first.endswith("}"):
            return listing("JSON lines", _line_rows(path, text, columns))
        raise DataError(f"{path} must be valid JSON, got an error: {shortened(error)}.") from error
    return _listing_of(path, whole, columns)


def _listing_of(path: Path, whole: Any, columns: Columns) -> Listing:
    if isinstance(whole, Mapping):
        found = _of_mapping(path, whole, columns)
        if found is not None:
            return found
    if _is_list(whole):
        return listing("JSON records", _record_rows(path, whole, columns))
    keys = ", ".join(map(repr, whole)) if isinstance(whole, Mapping) else type(whole).__name__
    raise DataError(
        f"{path} must be JSON of captions (COCO's, Karpathy's, or a list of records with an image "
        f"and a caption), got {shortened(keys)}."
    )


def _of_mapping(path: Path, whole: Mapping[str, Any], columns: Columns) -> Listing | None:
    """Return the rows of a JSON object; None if its layout is unknown."""
    images, captions = whole.get("images"), whole.get("annotations")
    if _is_list(images) and _is_list(captions):
        return listing("COCO captions", _coco_rows(path, images, captions))
    if _is_list(images) and any("sentences" in one for one in images if isinstance(one, Mapping)):
        return listing("Karpathy's splits", _karpathy_rows(path, images))
    records = [value for value in whole.values() if _is_list(value)]
    if len(records) == 1:
        return listing("JSON records", _record_rows(path, records[0], columns))
    if _is_record(whole, columns):  # JSON lines of one line
        return listing("JSON lines", [_record(f"{path.name}:1", whole, columns)])
    return None


def _coco_rows(
    path: Path, images: Sequence[Any], captions: Sequence[Any]
) -> Iterator[Row | Problem]:
    names = {
        _key(image.get("id")): image.get("file_name")
        for image in images
        if isinstance(image, Mapping)
    }
    for number, one in enumerate(captions):
        where = f"{path.name}: annotations[{number}]"
        name = names.get(_key(one.get("image_id"))) if isinstance(one, Mapping) else None
        if isinstance(name, str):
            yield Row(where, name, _text(one.get("caption")))
        else:
            yield Problem(where, NO_IMAGE, shortened(one))


def _karpathy_rows(path: Path, images: Sequence[Any]) -> Iterator[Row | Problem]:
    for number, one in enumerate(images):
        where = f"{path.name}: images[{number}]"
        name = one.get("filename") if isinstance(one, Mapping) else None
        sentences = one.get("sentences") if isinstance(one, Mapping) else None
        if not (isinstance(name, str) and _is_list(sentences)):
            yield Problem(where, NO_RECORD, shortened(one))
            continue
        folder, split = _text(one.get("filepath")), split_named(_text(one.get("split")))
        for index, sentence in enumerate(sentences):
            raw = sentence.get("raw") if isinstance(sentence, Mapping) else sentence
            yield Row(
                f"{where}.sentences[{index}]",
                f"{folder}/{name}" if folder else name,
                _text(raw),
                split=split,
            )


def _record_rows(path: Path, records: Sequence[Any], columns: Columns) -> Iterator[Row | Problem]:
    for number, record in enumerate(records):
        yield _record(f"{path.name}: [{number}]", record, columns)


def _line_rows(path: Path, text: str, columns: Columns) -> Iterator[Row | Problem]:
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path.name}:{number}"
        if line.strip():
            try:
                yield _record(where, json.loads(line), columns)
            except (ValueError, RecursionError):
                yield Problem(where, "the line is not valid JSON", shortened(line))


def _record(where: str, record: Any, columns: Columns) -> Row | Problem:
    if not _is_record(record, columns):
        return Problem(where, NO_RECORD, shortened(record))
    find = _finder(record)
    image, caption = find(columns[0], IMAGE), find(columns[1], CAPTION)
    return Row(
        where,
        _text(image),
        _text(caption),
        _text(find(None, LABEL)),
        split_named(_text(record.get("split"))),
    )


def _finder(record: Mapping[str, Any]) -> Callable[[str | None, Sequence[str]], Any]:
    def find(asked: str | None, names: Sequence[str]) -> Any:
        wanted = (asked,) if asked else names
        return next((record[name] for name in wanted if name in record), None)

    return find


def _is_record(record: Any, columns: Columns) -> bool:
    if not isinstance(record, Mapping):
        return False
    find = _finder(record)
    image = find(columns[0], IMAGE)
    said = find(columns[1], CAPTION) if columns[1] else find(None, (*CAPTION, *LABEL))
    return isinstance(image, str) and said is not None


def _key(value: Any) -> str:
    """Return an id as text: some files have numbers in one place and texts in the other."""
    return str(value) if isinstance(value, (str, int)) else ""


def _text(value: Any) -> str:
    return " ".join(str(value).split()) if isinstance(value, (str, int, float)) else ""


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)
