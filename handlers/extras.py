"""The check that a package of an extra is installed."""

from __future__ import annotations

import importlib.util


def check_extra(extra: str, package: str, *, needed_by: str) -> None:
    """Check that a package is installed that only an extra brings.

    The class or argument that needs it is the subject of the message.

    Raises:
        ImportError: if the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{needed_by} needs the package {package}. Install it with pip install "
            f"'diptych[{extra}]'."
        )
