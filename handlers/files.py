"""Folders and files that handlers write."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from diptych.handlers.contained_paths import fitting_name

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
"""The suffix of a file or folder that is still being written."""
WAITS = (0.01, 0.05, 0.2, 0.5) if os.name == "nt" else ()
"""Seconds to wait before a file is replaced again: on Windows, a virus scanner may hold it open."""
NO_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""The errors of a file system that cannot flush a file."""
FAILURES = {
    *(errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT, errno.ENOTDIR),
    *(errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}
"""The errors of a folder's flush that mean more than a file system without it."""

_reported: set[Path] = set()


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

    The content goes to `unfinished_path(path)`, is flushed to the disk, and replaces the file. If a
    symbolic link is at either path, the link is replaced, and its target stays as it is. The folder
    exists. The content is text (UTF-8), bytes, or a function that writes a file at a given path.

    Raises:
        OSError: if the file cannot be written; an earlier file stays. If the file system has
            damaged the earlier file, the new content stays at `unfinished_path(path)`.
    """
    temporary = unfinished_path(path)
    try:
        temporary.unlink(missing_ok=True)  # a link there would lead the content elsewhere
        if callable(content):
            content(temporary)
        else:
            with temporary.open("xb") as file:
                # The bytes of a path may be no text.
                file.write(
                    content.encode(errors="replace") if isinstance(content, str) else content
                )
        with temporary.open("rb+") as file:
            flush_file(file.fileno(), path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    before = _identity(path)
    try:
        replace_file(temporary, path)
    except BaseException:
        if _identity(path) == before:
            temporary.unlink(missing_ok=True)
        raise


def replace_file(source: Path, path: Path) -> None:
    """Rename a file to a path, where there may be another file.

    Raises:
        OSError: if it cannot be renamed.
    """
    for wait in (*WAITS, None):
        try:
            _replace_once(source, path)
        except PermissionError:  # noqa: PERF203
            if wait is None:
                raise
            time.sleep(wait)
        else:
            return


def _replace_once(source: Path, path: Path) -> None:
    try:
        source.replace(path)
    except FileExistsError:  # the file system cannot rename over a file
        path.unlink()
        source.replace(path)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is replaced or written; None if there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def flush_file(descriptor: int, path: Path) -> None:
    """Flush a file to the disk; if its file system cannot, log that once for each folder.

    Raises:
        OSError: if the flush fails.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
        _report(path.parent, error)


def flush_folder(folder: Path, *, of: Path | None = None) -> None:
    """Flush a folder to the disk: only then does a rename in it survive a power failure.

    Some network file systems, and Windows, cannot flush or open a folder. That is logged once. The
    log names the folder `of` instead, once for all folders inside of it.

    Raises:
        OSError: if the flush fails.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in FAILURES:
            raise
        _report(of or folder, error)


def _report(folder: Path, error: OSError) -> None:
    if folder not in _reported:
        _reported.add(folder)
        logger.warning(
            "The file system of %s cannot flush to the disk: %s.\nAfter a power failure, the "
            "latest files may be missing.",
            folder,
            error,
        )


def unfinished_path(path: Path) -> Path:
    """Return the path at which the new content of a file is written."""
    return path.with_name(fitting_name(path.name, UNFINISHED))
