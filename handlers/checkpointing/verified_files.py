"""Files that are read back after writing, with their sizes and checksums."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


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
    """Write a file, flush it to the disk, read it back, and return its size and checksum.

    Args:
        path: the path of the file; its folder exists.
        write: writes the content to the `ChecksummedFile` that it is called with.

    Raises:
        OSError: if the file cannot be written or its content differs from what was written.
    """
    with path.open("wb") as file:
        checksummed = ChecksummedFile(file)
        write(checksummed)
        file.flush()
        os.fsync(file.fileno())
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


def flush_folder(folder: Path) -> None:
    """Flush a folder to the disk: only then is a rename inside it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_path(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
