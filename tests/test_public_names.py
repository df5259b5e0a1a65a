"""The public names of the packages: listed, importable, documented, in the reference.

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
PACKAGES = ("engine", "handlers", "losses", "recipes")
WRITTEN_DOWN = ROOT / "tests" / "public_names.txt"


def package_of(name: str) -> ModuleType:
    """Return the package that a package installs as."""
    return importlib.import_module(f"diptych.{name}")


def public_names() -> list[str]:
    """Return every name that a package exports, with the package's own before it."""
    exports = {package: sorted(getattr(package_of(package), "__all__", ())) for package in PACKAGES}
    return [f"diptych.{package}.{name}" for package, names in exports.items() for name in names]


NAMES = public_names()


def exported(name: str) -> object:
    """Return what a full name stands for."""
    package, _, last = name.rpartition(".")
    return getattr(importlib.import_module(package), last)


def test_a_change_of_the_public_names_is_deliberate() -> None:
    written_down = WRITTEN_DOWN.read_text("utf-8").split()
    added, removed = sorted({*NAMES} - {*written_down}), sorted({*written_down} - {*NAMES})

    assert (added, removed) == ([], []), "if this is meant: make public-names"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_exports_each_name_once(package: str) -> None:
    names = package_of(package).__all__

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


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_lists_nothing_that_is_not_public(package: str) -> None:
    page = (ROOT / "docs" / "api" / f"{package}.md").read_text("utf-8")
    listed = re.findall(r"^::: (\S+)$", page, re.MULTILINE)

    assert [name for name in listed if name not in NAMES] == []


if __name__ == "__main__":
    WRITTEN_DOWN.write_text("\n".join(public_names()) + "\n", encoding="utf-8")
