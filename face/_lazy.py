"""Lazy names of a package: each is imported when it is first asked for."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path


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

    return sorted(homes), get, lambda: sorted(homes)


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
