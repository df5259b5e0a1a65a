"""A file that grows by whole chunks, and keeps in memory those that cannot be written yet."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from diptych.handlers.contained_paths import is_link
from diptych.handlers.files import flush_file, make_folder

MOST_WAITING = 1 << 25
"""Bytes that wait for a file at most, 32 MiB."""


class AppendedFile:
    """A file to which chunks are appended, each of them whole or not at all.

    A chunk that cannot be written waits in memory, and is written by a later `append` or `flush`,
    in order. If a write fails, the part that reached the file is removed. The file is opened by the
    first write; after an error it is opened again. A symbolic link is not followed. Its folder is
    made if it is missing. `written` is called with each chunk that was written.
    """

    def __init__(self, path: Path, written: Callable[[bytes], object] | None = None) -> None:
        self.path = path
        self.dropped = 0  # chunks that did not fit into the memory for waiting ones
        self._written = written
        self._waiting: deque[bytes] = deque()
        self._size = 0  # of the chunks that wait
        self._cut: int | None = None  # size to cut the file to before anything is written
        self._file: FileIO | None = None

    @property
    def waiting(self) -> list[bytes]:
        """The chunks that are not in the file yet."""
        return list(self._waiting)

    @property
    def unwritten(self) -> int:
        """The number of chunks that are not in the file."""
        return len(self._waiting) + self.dropped

    @property
    def is_open(self) -> bool:
        """Whether the file is open."""
        return self._file is not None

    def keep(self, chunks: Iterable[bytes]) -> None:
        """Add chunks that a later `append` or `flush` writes.

        If more than `MOST_WAITING` bytes wait, chunks from the middle are dropped: the first ones
        describe the run, and the last ones its end.
        """
        for chunk in chunks:
            self._waiting.append(chunk)
            self._size += len(chunk)
        while self._size > MOST_WAITING and len(self._waiting) > 1:
            middle = len(self._waiting) // 2
            self._size -= len(self._waiting[middle])
            del self._waiting[middle]
            self.dropped += 1

    def append(self, chunk: bytes) -> None:
        """Write a chunk after those that wait.

        Raises:
            OSError: if it could not be written; it waits.
        """
        self.keep((chunk,))
        self.flush()

    def cut(self, size: int) -> None:
        """Cut the file to a size, now or before the next chunk is written.

        Raises:
            OSError: if it cannot be cut now.
        """
        if self.path.exists():
            self._cut = size
            self._opened()

    def flush(self, *, durable: bool = False) -> None:
        """Write the chunks that wait.

        If they are to be `durable`, they are on the disk afterwards.

        Raises:
            OSError: if not all could be written; the rest waits.
        """
        try:
            if self._waiting:
                file = self._opened()
                while self._waiting:
                    self._write(file, self._waiting[0])
                    chunk = self._waiting.popleft()
                    self._size -= len(chunk)
                    if self._written is not None:
                        self._written(chunk)
            if durable and self._file is not None:
                flush_file(self._file.fileno(), self.path)
        except BaseException:
            self._abandon()
            raise

    def close(self) -> None:
        """Write the chunks that wait, and close the file.

        Raises:
            OSError: if not all could be written, or the file cannot be closed; it is not open
                afterwards.
        """
        try:
            self.flush()
        finally:
            file, self._file = self._file, None
            if file is not None:
                file.close()

    def _opened(self) -> FileIO:
        if self._file is None:
            make_folder(self.path.parent)
            if is_link(self.path):  # in a directory from elsewhere, it may lead to any file
                raise OSError(
                    errno.ELOOP, "it is a symbolic link; remove it, or give the path of its target"
                )
            if self.path.is_fifo():  # opening it would wait for a reader
                raise OSError(errno.EINVAL, "it is a pipe; remove it")
            self._file = FileIO(self.path, "a")
        if self._cut is not None:
            if self._cut < self._file.seek(0, os.SEEK_END):  # never longer: it may be a new file
                self._file.truncate(self._cut)
            self._cut = None
        return self._file

    def _write(self, file: FileIO, chunk: bytes) -> None:
        before, left = file.seek(0, os.SEEK_END), memoryview(chunk)
        try:
            while left:  # a disk that becomes full takes the beginning only
                count = file.write(left)
                left = left[_positive(count) :]
        except BaseException:
            self._cut = before
            raise

    def _abandon(self) -> None:
        """Remove the part of a chunk that was written, and close the file, without errors."""
        file, self._file = self._file, None
        if file is None:
            return
        with suppress(OSError):  # the next attempt cuts the file
            if self._cut is not None:
                file.truncate(self._cut)
                self._cut = None
        with suppress(OSError):  # the error of the write says what is wrong
            file.close()


def _positive(count: int | None) -> int:
    """Return the number of bytes that a write took; raise OSError if it took none."""
    if not count:
        raise OSError(errno.EAGAIN, "the file took nothing")
    return count
