"""The manifest: the file that lists the complete checkpoints of a directory."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from diptych.engine.errors import CheckpointError
from diptych.handlers.checkpointing.entries import Entry, check_distinct, entry_from
from diptych.handlers.contained_paths import is_link, open_file
from diptych.handlers.files import replace_file, unfinished_path, write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@attrs.frozen
class Manifest:
    """The content of a manifest.

    Attributes:
        entries: the checkpoints, in the order in which they were saved.
        as_written: whether the checksum in the file belongs to the entries. An earlier version
            wrote no checksum, which counts as one that does.
        path: the file it was read from: beside the manifest if the manifest is lost.
    """

    entries: list[Entry]
    as_written: bool
    path: Path


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a directory, without entries if there is none.

    A file system whose renames are not atomic may lose the manifest if the process is killed
    during one. The new content is then still in the unfinished file, and its checksum proves it.

    Raises:
        CheckpointError: if there is a manifest that cannot be read.
    """
    path = directory / MANIFEST
    try:
        return _parsed(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        rescued = _unfinished(path)
        if rescued is not None:
            return rescued
        if isinstance(error, FileNotFoundError):
            return Manifest([], True, path)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{path} cannot be read: {error}. Check the path and its rights."
            ) from error
        raise CheckpointError(
            f"{path} is not a manifest of checkpoints: {error}. Move it away, and resume from the "
            "path of a checkpoint."
        ) from error


def restore_manifest(directory: Path) -> None:
    """Rename the unfinished manifest if the manifest is lost.

    Raises:
        CheckpointError: if there is a manifest that cannot be read.
        OSError: if the file cannot be renamed.
    """
    manifest = read_manifest(directory)
    if manifest.path.name != MANIFEST:
        replace_file(manifest.path, directory / MANIFEST)


def write_manifest(directory: Path, entries: Sequence[Entry]) -> None:
    """Replace the manifest of a directory atomically.

    Raises:
        CheckpointError: if there is a manifest that cannot be read.
        OSError: if it cannot be written.
    """
    restore_manifest(directory)  # the new content would overwrite the unfinished file
    listed = [attrs.asdict(entry) for entry in entries]
    content = {"checkpoints": listed, "crc32": _digest(listed)}
    write_atomically(directory / MANIFEST, json.dumps(content, indent=1))


def _parsed(path: Path) -> Manifest:
    if is_link(path):
        raise ValueError("it is a symbolic link")
    with open_file(path) as file:
        content = json.loads(file.read())
    listed = content["checkpoints"]
    entries = [entry_from(item) for item in listed]
    check_distinct(entries)
    as_written = content.keys() == {"checkpoints"} or content.get("crc32") == _digest(listed)
    return Manifest(entries, as_written, path)


def _unfinished(path: Path) -> Manifest | None:
    """Return the manifest that was about to replace another one, if all of it was written."""
    temporary = unfinished_path(path)
    try:
        found = _parsed(temporary)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if found.as_written else None


def _digest(listed: Any) -> int:
    return zlib.crc32(json.dumps(listed, sort_keys=True).encode())
