"""Disks that are full for a while, as the tests of handlers that write need them."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ignite.engine import Events

from diptych.engine import Trainer


@contextmanager
def no_room(room: int = 0) -> Iterator[None]:
    """Let no file of this process grow beyond a size: the system refuses, in the middle of a write.

    The error is EFBIG, since a limit of the process takes the place of the disk's.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Outage:
    """A disk that is full from one iteration's start to another's, or to the end of the run."""

    def __init__(self, trainer: Trainer, first: int, last: int | None, room: int = 0) -> None:
        self._stack, self._room = contextlib.ExitStack(), room
        trainer.add_event_handler(Events.ITERATION_STARTED(once=first), self._begin)
        if last is not None:
            trainer.add_event_handler(Events.ITERATION_STARTED(once=last), self.end)

    def _begin(self) -> None:
        self._stack.enter_context(no_room(self._room))

    def end(self) -> None:
        """Make room again."""
        self._stack.close()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of a size at a folder.

    Raises:
        PermissionError: if this process may not.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise PermissionError(*error.args) from error
    if done.returncode:
        raise PermissionError(done.stderr.decode())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # noqa: S607


def fill(folder: Path) -> Path:
    """Write a file that leaves no room on a file system, and return it."""
    path = folder / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(os.urandom(4096))
    return path
