"""Folders and files that handlers write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

UNFINISHED = ".unfinished"
"""The suffix of a file or folder that is still being written."""


def make_folder(path: Path) -> None:
    """Make a folder, and its parents, unless it exists.

    Raises:
        OSError: naming the folder, of the type that the system raised.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno, f"the folder {path} cannot be made: {error.strerror}; give another folder"
        ) from error


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file so that a reader sees the old or the new one, even if the process is killed.

    The content goes to `unfinished_path(path)`, is flushed to the disk, and replaces the file.

    Args:
        path: of the file; its folder exists.
        content: text (UTF-8), bytes, or a function that writes a file at the path that it is given.

    Raises:
        OSError: if the file cannot be written; an earlier file stays.
    """
    temporary = unfinished_path(path)
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def unfinished_path(path: Path) -> Path:
    """Return the path at which the new content of a file is written."""
    return path.with_name(path.name + UNFINISHED)
