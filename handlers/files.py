"""The folders that handlers write into."""

from __future__ import annotations

from pathlib import Path


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where it is not there.

    Raises:
        OSError: naming the folder, of the kind that the system raised.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno, f"the folder {path} cannot be made: {error.strerror}; give another folder"
        ) from error
