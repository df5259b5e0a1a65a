"""Names in messages: patterns of dotted names, suggestions for unknown ones, lists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

SHOWN = 8
"""Names, differences or ranks that a message lists."""


def matches(name: str, pattern: str) -> bool:
    """Return whether a name starts with a pattern, part by part; parts may have wildcards."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(patterns) <= len(parts) and all(map(fnmatchcase, parts, patterns))


def check_pattern(pattern: str, names: Iterable[str]) -> None:
    """Check that a pattern matches a name.

    Raises:
        ValueError: if no name starts with it; the message lists similar ones.
    """
    names = list(names)
    if not any(matches(name, pattern) for name in names):
        raise ValueError(
            f"a pattern must match parameters, got {pattern!r}, which matches none. "
            f"{near_matches(pattern, _paths(names))}"
        )


def listed(names: Iterable[str], most: int = SHOWN) -> str:
    """Return names as a list in a sentence: the first ones, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def near_matches(word: str, known: Iterable[str]) -> str:
    """Return a sentence for an error on the known names: similar ones, else all."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"Similar names: {', '.join(close)}"
    return f"Known names: {listed(known, 12)}"


def _paths(names: Iterable[str]) -> list[str]:
    """Return every prefix of the names, in whole parts, the short ones first."""
    paths = {
        ".".join(parts[:length])
        for parts in (name.split(".") for name in names)
        for length in range(1, len(parts) + 1)
    }
    return sorted(paths, key=lambda path: (path.count("."), path))
