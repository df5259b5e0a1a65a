"""Patterns of dotted names, and what an error says about a name that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Say whether a name begins with a pattern, in whole parts, which may hold wildcards."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(patterns) <= len(parts) and all(map(fnmatchcase, parts, patterns))


def check_pattern(pattern: str, names: Iterable[str]) -> None:
    """Check that a pattern holds something.

    Raises:
        ValueError: if no name begins with it; the message lists the near ones.
    """
    names = list(names)
    if not any(matches(name, pattern) for name in names):
        raise ValueError(
            f"a pattern must match parameters, got {pattern!r}, which matches none; "
            f"{near_matches(pattern, _paths(names))}"
        )


def near_matches(word: str, known: Iterable[str]) -> str:
    """Return what an error says about the names that are there: the close ones, else all."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"close are {', '.join(close)}"
    return f"there are {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"


def _paths(names: Iterable[str]) -> list[str]:
    """Return all beginnings of names in whole parts, the short ones first."""
    paths = {
        ".".join(parts[:length])
        for parts in (name.split(".") for name in names)
        for length in range(1, len(parts) + 1)
    }
    return sorted(paths, key=lambda path: (path.count("."), path))
