"""Lazy names of a package: each is imported when it is first asked for."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

COLUMN = 27
"""Width of the names on a page."""


def lazy_names(
    package: str, file: str
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """Return `__all__`, `__getattr__` and `__dir__` of a package, read from its stub.

    The stub, `__init__.pyi` beside the package's `__init__.py`, is what type checkers and editors
    read. Here the same lines say where each name is found, so that no list is written twice.

    Args:
        package: the package's `__name__`.
        file: the package's `__file__`.
    """
    homes = _homes(Path(file).with_suffix(".pyi"))

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:  # a module of the package itself
            return importlib.import_module(f"{package}.{name}")
        value: object = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)  # the next access finds it at once
        return value

    module = sys.modules[package]
    vars(module)["_homes"] = homes
    module.__class__ = _Facade
    return sorted(homes), get, lambda: sorted(homes)


class _Facade(ModuleType):
    """A package whose documentation ends with its public names: the first page of `help()`."""

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        """The docstring, and the public names in groups."""
        own: str = vars(self)["__doc__"] or ""
        return "\n\n".join([own.rstrip(), *_page(self, vars(self)["_homes"])])


def _page(package: ModuleType, homes: dict[str, str]) -> Iterator[str]:
    """Yield the public names by folder: with a line each, those of other packages without."""
    groups: dict[str, list[str]] = {}
    for name, home in sorted(homes.items(), key=lambda item: item[0].lower()):
        is_facade = home != package.__name__ and isinstance(sys.modules.get(home), _Facade)
        folder = home if is_facade else home[len(package.__name__) + 1 :].rpartition(".")[0]
        groups.setdefault(folder, []).append(name)
    for folder, names in sorted(groups.items()):
        if isinstance(sys.modules.get(folder), _Facade):
            lines = [_filled(", ".join(names))]
        else:
            lines = [_entry(name, getattr(package, name)) for name in names]
        yield "\n".join([f"{folder}:" if folder else "Names:", *lines])


def _entry(name: str, thing: object) -> str:
    """Return a name and the first line of its documentation, if it has one of its own."""
    text = inspect.getdoc(thing) if callable(thing) else None
    if isinstance(thing, ModuleType):
        text = vars(thing)["__doc__"]  # of a facade: without its page
    first = (text or "").partition("\n")[0]
    return _filled(f"{name:<{COLUMN}}{first}".rstrip(), 4 + COLUMN)


def _filled(text: str, indent: int = 4) -> str:
    """Return a paragraph that starts at column 4, and continues at `indent`."""
    return textwrap.fill(
        text,
        100,
        initial_indent=" " * 4,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )


def _homes(stub: Path) -> dict[str, str]:
    """Return each name that a stub re-exports, with the module that it imports it from."""
    homes: dict[str, str] = {}
    for node in ast.parse(stub.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [alias.name for alias in node.names]
            if names == ["*"]:
                names = importlib.import_module(node.module).__all__
            homes |= dict.fromkeys(names, node.module)
    return homes
