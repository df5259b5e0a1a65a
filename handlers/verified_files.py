"""Files that are read back after writing, with their sizes and checksums, and their removal."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from diptych.handlers.contained_paths import is_link, is_plain_file
from diptych.handlers.files import flush_file


class ChecksummedFile:
    """A binary file that counts the bytes written to it and computes their checksum.

    Attributes:
        size: bytes written so far.
        crc32: the checksum of these bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = self.crc32 = 0

    def write(self, data: bytes) -> int:
        """Write bytes; return their number."""
        self.crc32 = zlib.crc32(data, self.crc32)
        written = self._file.write(data)
        self.size += written
        return written

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()


def write_verified(path: Path, write: Callable[[Any], object]) -> tuple[int, int]:
    """Write a new file, flush it to the disk, read it back, and return its size and checksum.

    The folder exists. The function writes the content to a `ChecksummedFile`.

    Raises:
        OSError: if the file exists, cannot be written, or its content differs from what was
            written.
    """
    with path.open("xb") as file:
        checksummed = ChecksummedFile(file)
        write(checksummed)
        file.flush()
        flush_file(file.fileno(), path)
    written = checksummed.size, checksummed.crc32
    if size_and_crc32(path) != written:
        raise OSError("its content differs from what was written")
    return written


def size_and_crc32(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and its checksum.

    Raises:
        OSError: if the file cannot be read.
    """
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return path.stat().st_size, checksum


def is_intact(path: Path, size: int, crc32: int) -> bool:
    """Return whether a file has the size and checksum that it was written with.

    Raises:
        OSError: if the file cannot be read.
    """
    return path.stat().st_size == size and size_and_crc32(path) == (size, crc32)


def remove_file(path: Path) -> None:
    """Remove a regular file if there is one; leave a link or folder of its name alone."""
    if is_plain_file(path):
        path.unlink(missing_ok=True)


def remove_folder(path: Path, files: re.Pattern[str]) -> None:
    """Remove a folder with its files of certain names; a folder with anything else stays.

    A symbolic link to a folder stays, with its target.
    """
    if is_link(path) or not path.is_dir():
        return
    for inside in list(path.iterdir()):
        if files.fullmatch(inside.name):
            remove_file(inside)
    with contextlib.suppress(OSError):  # it holds something that nobody here has written
        path.rmdir()
