"""The public names of the three rooms: written down, importable, documented, in the reference.

`make public-names` writes tests/public_names.txt anew after a deliberate change.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engine", "handlers", "losses")
WRITTEN_DOWN = ROOT / "tests" / "public_names.txt"


def room_of(name: str) -> ModuleType:
    """Return the package that a room installs as."""
    return importlib.import_module(f"diptych.{name}")


def public_names() -> list[str]:
    """Return every name that a room exports, with the room's own before it."""
    exports = {room: sorted(getattr(room_of(room), "__all__", ())) for room in ROOMS}
    return [f"diptych.{room}.{name}" for room, names in exports.items() for name in names]


NAMES = public_names()


def exported(name: str) -> object:
    """Return what a full name stands for."""
    room, _, last = name.rpartition(".")
    return getattr(importlib.import_module(room), last)


def test_a_change_of_the_public_names_is_deliberate() -> None:
    written_down = WRITTEN_DOWN.read_text("utf-8").split()
    added, removed = sorted({*NAMES} - {*written_down}), sorted({*written_down} - {*NAMES})

    assert (added, removed) == ([], []), "if this is meant: make public-names"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_exports_each_name_once(room: str) -> None:
    names = room_of(room).__all__

    assert names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented(name: str) -> None:
    thing = exported(name)
    text = inspect.getdoc(thing) or ""

    assert len(text.split()) > 3


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_in_the_reference_once(name: str) -> None:
    page = ROOT / "docs" / "api" / f"{name.split('.')[1]}.md"
    listed = re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)

    assert listed.count(name) == 1


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_lists_nothing_that_is_not_public(room: str) -> None:
    page = (ROOT / "docs" / "api" / f"{room}.md").read_text("utf-8")
    listed = re.findall(r"^::: (\S+)$", page, re.MULTILINE)

    assert [name for name in listed if name not in NAMES] == []


if __name__ == "__main__":
    WRITTEN_DOWN.write_text("\n".join(public_names()) + "\n", encoding="utf-8")
