"""The size and the checksum of a file: enough to tell that it is not what was written."""

from __future__ import annotations

import zlib
from pathlib import Path


def size_and_crc32(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and its checksum.

    Raises:
        OSError: if it cannot be read.
    """
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return path.stat().st_size, value
