"""The digest of a file of lines, chained line by line, that finds the first damaged line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diptych.handlers.contained_paths import open_file

MARK = 2  # bytes of each line's digest that are kept to find a damaged line


class LineChain:
    """The size and the digest of the lines of a file, of which each includes those before it.

    Two bytes of each line's digest are kept, so that the first damaged line can be named.
    """

    def __init__(self) -> None:
        self.size = 0
        self._digest = b""
        self._marks = bytearray()

    @classmethod
    def of_file(cls, path: Path, size: int | None = None) -> LineChain:
        """Return the chain of the whole lines of a file, or of its first bytes.

        Raises:
            OSError: if the file cannot be read.
        """
        chain = cls()
        for line in whole_lines(path, size):
            chain.add(line)
        return chain

    def __len__(self) -> int:
        """The number of lines."""
        return len(self._marks) // MARK

    def add(self, line: bytes) -> None:
        """Add a line."""
        self._digest = hashlib.sha256(self._digest + line).digest()
        self._marks += self._digest[:MARK]
        self.size += len(line)

    def state_dict(self) -> dict[str, Any]:
        """Return size, digest and marks, the latter two in hexadecimal."""
        return {
            "size": self.size,
            "digest": self._digest.hex(),
            "marks": self._marks.hex(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self.size = int(state_dict["size"])
        self._digest = bytes.fromhex(state_dict["digest"])
        self._marks = bytearray.fromhex(state_dict["marks"])

    def damage(self, path: Path) -> str | None:
        """Return where a file first differs from the lines of this chain, in words.

        Lines after those of the chain do not count.

        Returns:
            None if all lines are in the file as they were written.

        Raises:
            OSError: if the file cannot be read.
        """
        found, number = LineChain(), 0
        for number, line in enumerate(whole_lines(path, self.size), 1):
            found.add(line)
            if found._marks[-MARK:] != self._marks[(number - 1) * MARK : number * MARK]:
                return f"line {number} has changed"
        if (found.size, found._digest) == (self.size, self._digest):
            return None
        if number < len(self):
            return f"line {number + 1} of {len(self)} is missing or has changed"
        return f"line {number} has changed"  # two bytes of a digest were equal by chance


def whole_lines(path: Path, size: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a file that end with a line feed, with it, up to a size in bytes."""
    left = size
    with open_file(path) as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            if left is not None:
                if left < len(line):
                    return
                left -= len(line)
            yield line
