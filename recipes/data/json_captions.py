"""Captions in JSON: COCO, Karpathy's splits, records, columns, captions by image, JSON lines."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
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
    split_of,
)
from diptych.recipes.data.text_tables import (
    CAPTION,
    IMAGE,
    LABEL,
    Columns,
    caption_columns,
    captions_in,
    is_image_name,
    lines_of,
    plain_name,
)

NO_IMAGE = "the entry names no image of the file"
NO_CAPTION = "the entry has no caption: those of COCO are in captions_*.json"
NO_RECORD = (
    "the entry is no record with an image and a caption, under names that are recognised "
    "(--image-column and --caption-column give others)"
)
NOT_JSON = "the line is not valid JSON"

Found = tuple[str, Iterator[Row | Problem]]
"""The name of a layout, and the rows."""


def read_json(path: Path, text: str, columns: Columns) -> Listing:
    """Return the rows of a file in JSON or JSON lines.

    Raises:
        DataError: if it is not valid, or of no known layout.
    """
    try:
        whole = _loaded(text)
    except RecursionError as error:
        raise DataError(f"{path} must be JSON of captions, got lists too deep.") from error
    except ValueError as error:
        lines = _json_lines(path, text, columns)
        if lines is None:
            reason = shortened(error)
            raise DataError(f"{path} must be valid JSON, got an error: {reason}.") from error
        return lines
    if isinstance(whole, list):
        records = whole if _as_record(whole) is whole else [whole]  # JSON lines of one line
        return listing("JSON records", _record_rows(path, records, columns))
    found = _of_data_set(path, whole) or _of_mapping(path, whole, columns)
    if found is None:
        raise DataError(
            f"{path} must be JSON of captions (COCO's, Karpathy's, a list of records with an image "
            "and a caption, or captions by image), got "
            f"{shortened(', '.join(map(repr, whole))) or 'an empty object'}. Name your "
            "columns with --image-column and --caption-column."
        )
    return listing(*found)


def _json_lines(path: Path, text: str, columns: Columns) -> Listing | None:
    """Return the rows of JSON lines; None if the text has no record in its lines."""
    first = text.lstrip().partition("\n")[0].strip()
    if (first[:1], first[-1:]) not in {("{", "}"), ("[", "]")}:
        return None
    found = listing("JSON lines", _line_rows(path, text, columns))
    are_none = not found.rows and all(problem.kind == NOT_JSON for problem in found.problems)
    return None if are_none else found


def _loaded(text: str) -> Any:
    """Return what JSON has in it.

    Raises:
        ValueError: if it is not valid, or an object has a name twice: one would be left out.
    """
    return json.loads(text, object_pairs_hook=_once_each)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise ValueError(f"{name!r} is twice in an object; give it a list of captions")
    return found


def _of_data_set(path: Path, whole: Mapping[str, Any]) -> Found | None:
    """Return the layout and the rows of COCO's and Karpathy's objects; None for others."""
    images, captions = whole.get("images"), whole.get("annotations")
    if _is_list(images) and _is_list(captions):
        return "COCO captions", _coco_rows(path, images, captions)
    if _is_list(images) and any("sentences" in one for one in images if isinstance(one, Mapping)):
        return "Karpathy's splits", _karpathy_rows(path, images)
    return None


def _of_mapping(path: Path, whole: Mapping[str, Any], columns: Columns) -> Found | None:
    """Return the layout and the rows of a JSON object; None if its layout is unknown."""
    if any(map(is_image_name, whole)):
        return "captions by image", _rows_by_image(path, whole, columns)
    table = _table(whole, columns)
    if table is not None:
        return "JSON columns", _record_rows(path, table, columns)
    if _is_record(whole, columns):  # JSON lines of one line
        return "JSON lines", _record(f"{path.name}:1", whole, columns)
    lists = {key: value for key, value in whole.items() if _is_list(value)}
    if len(lists) == 1 or (lists and all(map(split_named, lists))):
        return "JSON records", _part_rows(path, lists, columns)
    return None


def _coco_rows(
    path: Path, images: Sequence[Any], captions: Sequence[Any]
) -> Iterator[Row | Problem]:
    names = {_key(image.get("id")): _name(image) for image in images if isinstance(image, Mapping)}
    for number, one in enumerate(captions):
        where = f"{path.name}: annotations[{number}]"
        key = _key(one.get("image_id")) if isinstance(one, Mapping) else ""
        name = names.get(key) if key else None
        if name and "caption" in one:
            yield Row(where, name, _text(one["caption"]))
        else:
            yield Problem(where, NO_CAPTION if name else NO_IMAGE, shortened(one))


def _karpathy_rows(path: Path, images: Sequence[Any]) -> Iterator[Row | Problem]:
    for number, one in enumerate(images):
        where = f"{path.name}: images[{number}]"
        name = _name(one.get("filename")) if isinstance(one, Mapping) else ""
        sentences = one.get("sentences") if isinstance(one, Mapping) else None
        if not (name and _is_list(sentences)):
            yield Problem(where, NO_RECORD, shortened(one))
            continue
        folder, split = _text(one.get("filepath")), split_of(_text(one.get("split")))
        image = f"{folder}/{name}" if folder else name
        for index, sentence in enumerate(sentences):
            yield Row(f"{where}.sentences[{index}]", image, _text(sentence), split=split)


def _rows_by_image(
    path: Path, whole: Mapping[str, Any], columns: Columns
) -> Iterator[Row | Problem]:
    """Yield the rows of an object whose keys are names of images."""
    for name, said in whole.items():
        record = said if isinstance(said, Mapping) else {columns[1] or CAPTION[0]: said}
        where = f"{path.name}: [{shortened(name)!r}]"
        yield from _record(where, {**record, columns[0] or IMAGE[0]: name}, columns)


def _table(whole: Mapping[str, Any], columns: Columns) -> list[Any] | None:
    """Return the records of an object with a list for each column, or an object, as in pandas."""
    lists = {name: [*p.values()] if isinstance(p, Mapping) else p for name, p in whole.items()}
    find = _finder(lists)
    needed = [find(columns[0], IMAGE), *(_said(lists, columns) or [find(None, LABEL)])]
    if not all(map(_is_list, needed)) or len(set(map(len, needed))) > 1:
        return None
    parts = {name: p for name, p in lists.items() if _is_list(p) and len(p) == len(needed[0])}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _part_rows(
    path: Path, parts: Mapping[str, Sequence[Any]], columns: Columns
) -> Iterator[Row | Problem]:
    for part, records in parts.items():
        yield from _record_rows(path, records, columns, part)


def _record_rows(
    path: Path, records: Sequence[Any], columns: Columns, part: str = ""
) -> Iterator[Row | Problem]:
    for number, record in enumerate(records):
        where = f"{path.name}: {shortened(part)}[{number}]"
        yield from _record(where, record, columns, split_named(part))


def _line_rows(path: Path, text: str, columns: Columns) -> Iterator[Row | Problem]:
    for where, line in lines_of(path, text):
        try:
            record = _loaded(line)
        except (ValueError, RecursionError):
            yield Problem(where, NOT_JSON, shortened(line))
            continue
        yield from _record(where, record, columns)


def _record(where: str, record: Any, columns: Columns, split: str = "") -> Iterator[Row | Problem]:
    """Yield a row for each caption of a record."""
    record = _as_record(record)
    if not _is_record(record, columns):
        yield Problem(where, NO_RECORD, shortened(record))
        return
    find = _finder(record)
    image, label = _name(find(columns[0], IMAGE)), _text(find(None, LABEL))
    split = split_of(_text(find(None, ("split",)))) or split
    for caption in captions_of(record, columns):
        yield Row(where, image, caption, label, split)


def captions_of(record: Mapping[str, Any], columns: Columns = (None, None)) -> list[str]:
    """Return the captions of a record; an empty one if it has none."""
    said = [one for one in _said(record, columns) if _is_list(one) or _text(one)] or [""]
    return [_text(one) for one in itertools.chain.from_iterable(map(captions_in, said))]


def _as_record(value: Any) -> Any:
    """Return a list of an image's name and its captions as a record; other values as they are."""
    if not (_is_list(value) and len(value) == 2 and isinstance(value[0], str)):
        return value
    return {IMAGE[0]: value[0], CAPTION[0]: value[1]} if is_image_name(value[0]) else value


def _finder(record: Mapping[str, Any]) -> Callable[[str | None, Sequence[str]], Any]:
    lower = {plain_name(name): value for name, value in record.items()}

    def find(asked: str | None, names: Sequence[str]) -> Any:
        wanted = (plain_name(asked),) if asked else names
        return next((lower[name] for name in wanted if name in lower), None)

    return find


def _is_record(record: Any, columns: Columns) -> bool:
    if not isinstance(record, Mapping):
        return False
    find, said = _finder(record), _said(record, columns)
    if columns[1] is None:
        said = [*said, find(None, LABEL)]
    return bool(_name(find(columns[0], IMAGE))) and any(one is not None for one in said)


def _said(record: Mapping[str, Any], columns: Columns) -> list[Any]:
    """Return the values of a record that are captions, or lists of them."""
    values = list(record.values())
    return [values[index] for index in caption_columns(list(record), columns[1])]


def _key(value: Any) -> str:
    """Return an id as text: some files have numbers in one place and texts in the other."""
    return str(value) if isinstance(value, (str, int)) else ""


def _name(value: Any) -> str:
    """Return the name of an image; an image may be a record of its own, as in `datasets`."""
    if isinstance(value, Mapping):
        value = _finder(value)(None, IMAGE)
    is_name = isinstance(value, (str, int)) and not isinstance(value, bool)
    return _encodable(str(value)).strip() if is_name else ""


def _text(value: Any) -> str:
    """Return a text on one line; of a record its caption, or the words of one without."""
    if isinstance(value, Mapping):
        find = _finder(value)
        value = find(None, CAPTION) or find(None, ("tokens",))
        value = " ".join(map(_text, value)) if _is_list(value) else value
    if isinstance(value, bool) or (isinstance(value, float) and math.isnan(value)):
        return ""  # pandas writes NaN for a missing caption
    is_text = isinstance(value, (str, int, float))
    return " ".join(_encodable(str(value)).split()) if is_text else ""


def _encodable(text: str) -> str:
    r"""Return a text that a file can hold: JSON may have half a character, such as `\ud83d`."""
    return text.encode("utf-8", "replace").decode()


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)
