"""Ignite's table of handlers, which notes that it was edited."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial, wraps
from typing import Any


class Edited:
    """Whether a table was edited since it was read.

    Attributes:
        since_read: whether it was.
    """

    since_read = False


class HandlerTable(defaultdict[Any, "list[Any]"]):
    """A mapping from an event to the entries of its handlers, as `Engine` keeps it.

    Ignite's profilers, and users who follow them, insert, replace and remove entries themselves,
    also while the event fires. An edit of the table, or of one of its lists, is noted in `edited`.
    """

    def __init__(self, edited: Edited) -> None:
        super().__init__(partial(Entries, edited))
        self._edited = edited

    def __setitem__(self, event: Any, entries: list[Any]) -> None:
        """Replace the entries of an event."""
        self._edited.since_read = True
        noted = entries if isinstance(entries, Entries) else Entries(self._edited, entries)
        super().__setitem__(event, noted)


class Entries(list[Any]):
    """The entries of an event; notes each edit."""

    def __init__(self, edited: Edited, entries: list[Any] | tuple[()] = ()) -> None:
        super().__init__(entries)
        self._edited = edited


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def edit(entries: Entries, *arguments: Any, **keywords: Any) -> Any:
        entries._edited.since_read = True  # noqa: SLF001 - a method of the class
        return method(entries, *arguments, **keywords)

    return edit


for _name in (
    *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse"),
    *("__setitem__", "__delitem__", "__iadd__", "__imul__"),
):
    setattr(Entries, _name, _noting(getattr(list, _name)))
