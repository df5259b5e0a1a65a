"""Names that were read from a file, and the paths in a directory for which they may stand.

A directory may come from somebody else, so that a name in it is data. It may be `..`, an absolute
path, or the name of a symbolic link. Whoever reads, writes or removes a file by such a name gets
its path here.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import zlib
from pathlib import Path
from typing import BinaryIO

LONGEST_NAME = 255
"""Bytes that a file's name may have on common file systems."""


def contained_path(folder: Path, name: object, pattern: re.Pattern[str]) -> Path:
    """Return the path of a file or folder directly inside a folder, which may be missing.

    The pattern matches every name that the caller itself gives to such a file.

    Raises:
        ValueError: if the name does not match, is not the name of one file, or is the name of a
            symbolic link.
    """
    check_name(name, pattern)
    path = folder / str(name)
    if is_link(path):
        raise ValueError(
            f"{path} must not be a symbolic link. Replace it by what it points to, or remove it."
        )
    return path


def check_name(name: object, pattern: re.Pattern[str]) -> None:
    """Check that a name that was read from a file is one that the caller gives.

    Raises:
        ValueError: if the name does not match, or is not the name of one file.
    """
    if not isinstance(name, str) or not pattern.fullmatch(name) or not _is_one_part(name):
        raise ValueError(
            f"a name in a file must be one that is given to such files here, got {name!r:.300}"
        )


def fitting_name(name: str, suffix: str) -> str:
    """Return a name with a suffix, cut if it would be too long, with a checksum of the whole."""
    encoded = os.fsencode(name)
    if len(encoded) + len(suffix) <= LONGEST_NAME:
        return name + suffix
    digest = f"~{zlib.crc32(encoded):08x}"
    room = LONGEST_NAME - len(suffix) - len(digest)
    return encoded[:room].decode(errors="ignore") + digest + suffix


def is_link(path: Path) -> bool:
    """Return whether a path is a symbolic link, or a junction of Windows."""
    junction = getattr(path, "is_junction", None)  # since Python 3.12
    return path.is_symlink() or (junction is not None and bool(junction()))


def is_plain_file(path: Path) -> bool:
    """Return whether there is a regular file at a path; a symbolic link is none."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def open_file(path: Path) -> BinaryIO:
    """Open a file to read it, if it is one: reading a pipe or a device may never end.

    Raises:
        OSError: if it cannot be opened, or is not a file.
    """
    kind = path.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # the system has an error for a folder
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return path.open("rb")


def _is_one_part(name: str) -> bool:
    """Return whether a name cannot lead out of a folder, whatever the pattern accepts."""
    forbidden = {"/", "\\", ":", "\0"}
    short = len(name.encode(errors="surrogatepass")) <= LONGEST_NAME
    return short and name not in {"", ".", ".."} and not forbidden & set(name)
