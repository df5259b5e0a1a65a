"""Import of the user's factory, a function that builds a trainer, from `module:function`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def find_factory(text: str) -> Callable[[], Any]:
    """Import the function that `module:function` names.

    The working directory is put on the path, as `python -m` does.

    Raises:
        ValueError: if the text has another form, the module cannot be imported, or it has no such
            function.
    """
    module, colon, function = text.partition(":")
    if not (module and colon and function):
        raise ValueError(f"factory must be module:function, such as train:build, got {text!r}.")
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.insert(0, here)
    try:
        found = import_module(module)
    except ImportError as error:
        raise ValueError(
            f"factory must be in a module that can be imported from {here}, got {module!r}: {error}"
        ) from error
    factory = getattr(found, function, None)
    if not callable(factory):
        raise ValueError(  # noqa: TRY004 - the text is wrong, not a type
            f"factory must be a function of module {module!r}, got {function!r}, "
            f"which is {'missing there' if factory is None else 'no function'}."
        )
    return factory  # type: ignore[no-any-return]
