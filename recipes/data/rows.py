"""Rows of a data set of images, and the report of those that cannot be used."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import attrs

Item = TypeVar("Item")

LETTERS, SHOWN, KINDS = 80, 5, 8
"""What a message quotes: letters of a text, rows of each kind of problem, and kinds."""
PAUSE = 10.0
"""The seconds between two lines about long work."""
LINES = 16
"""Lines of a report between its first and its last one."""

SPLITS = {
    "train": ("train", "training", "restval"),
    "val": ("val", "valid", "validate", "validation", "dev"),
    "test": ("test", "testing"),
}
"""The three parts of a data set, each with the names that files and folders use for it."""


class DataError(ValueError):
    """A user's data cannot be used; the message has at most 20 lines."""


def _on_one_line(label: str) -> str:
    return " ".join(label.split())


@attrs.frozen
class Row:
    """An image and one caption or label of it, as a file lists them.

    Attributes:
        where: the file and the line (in JSON, the entry): `captions.csv:8`.
        image: the name of the image.
        caption: the caption; empty if there is none.
        label: the class; empty if there is none.
        split: "train", "val" or "test"; empty if the file does not say; another word of the file's
            cannot be used.
    """

    where: str
    image: str
    caption: str = ""
    label: str = attrs.field(default="", converter=_on_one_line)
    split: str = ""


@attrs.frozen
class Problem:
    """An unusable row.

    Attributes:
        where: the file and the line.
        kind: the kind of problem, in words.
        detail: the wrong value.
    """

    where: str
    kind: str
    detail: str


@attrs.frozen
class Listing:
    """The rows of a file of captions, or of a folder of images.

    Attributes:
        layout: the name of the layout that was recognised.
        rows: the rows that can be read, in order.
        problems: those that cannot.
    """

    layout: str
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...] = ()


def listing(layout: str, found: Iterable[Row | Problem]) -> Listing:
    """Return the rows and the problems among what a reader has found."""
    rows: list[Row] = []
    problems: list[Problem] = []
    for one in found:
        if isinstance(one, Row):
            rows.append(one)
        else:
            problems.append(one)
    return Listing(layout, tuple(rows), tuple(problems))


def split_named(name: str) -> str:
    """Return the part of a data set that a name (`val2014`) stands for; empty if for none."""
    plain = re.sub(r"\d{4}$", "", name.strip().lower())
    return next((split for split, names in SPLITS.items() if plain in names), "")


def split_of(cell: str) -> str:
    """Return the part that a column of parts names; the text itself if it names none."""
    return split_named(cell) or cell.strip()


def shortened(text: object) -> str:
    """Return a value as text on one line, or its beginning if it is too long for a message."""
    line = " ".join(str(text)[: LETTERS + 1].split())
    line = line if line.isprintable() else ascii(line)[1:-1]  # a terminal would obey the others
    return line if len(line) <= LETTERS else f"{line[:LETTERS]}..."


def reported(items: Iterable[Item], what: str, total: int, size: int = 1) -> Iterator[Item]:
    """Yield items; write every ten seconds to stderr how many are done, so that no wait is silent.

    Args:
        items: the items.
        what: what is done, and to what: "Encoded images".
        total: of the things in all items.
        size: of the things in an item.
    """
    last = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        if time.monotonic() >= last + PAUSE:
            last = time.monotonic()
            sys.stderr.write(f"{what}: {min(number * size, total):,} of {total:,}\n")


def problem_report(problems: Sequence[Problem], usable: int) -> str:
    """Return a report of unusable rows: their number, and the first ones of each kind."""
    total = usable + len(problems)
    return "\n".join([f"{len(problems):,} of {total:,} rows cannot be used:", *_lines(problems)])


def _lines(problems: Sequence[Problem]) -> Iterator[str]:
    kinds = Counter(problem.kind for problem in problems).most_common()
    shown = kinds[:KINDS]
    each = min(SHOWN, max(1, LINES // len(shown) - 1)) if shown else 0
    for kind, count in shown:
        yield f"  {count:,}: {kind}"
        first = [problem for problem in problems if problem.kind == kind][:each]
        lines = [": ".join(filter(None, (one.where, one.detail))) for one in first]
        lines[-1] += f" (and {count - each:,} more)" if count > each else ""
        yield from (f"      {line}" for line in lines)
    if len(kinds) > KINDS:
        others = sum(count for _, count in kinds[KINDS:])
        yield f"  {others:,} with {len(kinds) - KINDS} other problems"
