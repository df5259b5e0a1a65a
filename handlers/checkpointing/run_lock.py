"""A lock that gives a run's directory to one trainer and its ranks."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import stat
import threading
import weakref
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import attrs

from diptych.engine.errors import CheckpointError
from diptych.handlers.contained_paths import is_link

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:
    msvcrt = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NAME = "run.lock"
HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}
LOCKED_BYTE = 1 << 30
"""Windows locks bytes, and nobody can read a locked one: it is far behind the holder's name."""
FLAGS = (
    os.O_RDWR
    | os.O_CREAT
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)


@attrs.define(eq=False)
class _Held:
    """A lock of this process, which all managers of one trainer share.

    Attributes:
        descriptors: of the locked file, and of the folder where that can be locked.
        owner: the trainer's id.
        count: how many managers hold it.
    """

    descriptors: list[int]
    owner: object
    count: int


_guard = threading.RLock()
_held: dict[str, _Held] = {}
"""The locks of this process, by the real paths of their files."""


class RunLock:
    """Locks a directory for one trainer; the system unlocks it when the process ends.

    Other programs, and this one, may read and copy the directory meanwhile. Processes that this one
    starts, such as a loader's workers, do not hold the lock after its end. The directory is made if
    it does not exist.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._key = ""
        self._mine: _Held | None = None
        self._unlock: Callable[[], object] | None = None

    def acquire(self, owner: object = None) -> None:
        """Lock the directory, unless this object has locked it.

        Two locks of one owner, other than None, may hold the directory together.

        Raises:
            CheckpointError: if another process or trainer has locked it, or it cannot be written.
        """
        with _guard:
            if self._mine is not None and _held.get(self._key) is self._mine:
                return
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._key = str(Path(os.path.realpath(self._path.parent)) / NAME)
                self._mine = _shared_or_new(self._path, self._key, owner)
            except OSError as error:
                raise CheckpointError(
                    f"directory {self._path.parent} cannot be written: {error}. Use another "
                    "directory, or make this one writable."
                ) from error
            self._unlock = partial(_let_go, self._key, self._mine)
            if owner is not None:  # a lock does not outlive its trainer
                self._unlock = weakref.finalize(owner, self._unlock)

    def follow(self) -> None:
        """Lock the directory that is at the path now, if this object has locked one that was moved.

        Raises:
            CheckpointError: if another process has locked it.
        """
        with _guard, contextlib.suppress(OSError):  # a save names what is wrong
            held, place = self._mine, Path(self._key)
            if held is None or _held.get(self._key) is not held or not place.parent.exists():
                return
            if not _is_at(place.parent if held.descriptors[1:] else place, held.descriptors[-1]):
                moved, held.descriptors = held.descriptors, _locked(self._path)
                for descriptor in moved:
                    os.close(descriptor)

    def release(self) -> None:
        """Unlock the directory, if this object has locked it."""
        if self._unlock is not None:
            self._unlock()
            self._unlock = None


def _shared_or_new(path: Path, key: str, owner: object) -> _Held:
    held = _held.get(key)
    if held is None:
        held = _held[key] = _Held(_locked(path), None if owner is None else id(owner), 0)
    elif owner is None or held.owner != id(owner):
        raise _refusal(
            path, f"one trainer, and another trainer of this process ({os.getpid()}) has it"
        )
    held.count += 1
    return held


def _let_go(key: str, held: _Held) -> None:
    """Close the file of a lock once its last holder releases it; do nothing in a forked process."""
    with _guard:
        if _held.get(key) is not held or held.count == 0:
            return
        held.count -= 1
        if held.count == 0:
            del _held[key]
            for descriptor in held.descriptors:
                with contextlib.suppress(OSError):
                    _change(descriptor, lock=False)
                os.close(descriptor)


def _locked(path: Path) -> list[int]:
    """Return the descriptors of a file and its folder, locked; the file names this process.

    The folder too, because a program that tidies up may remove the file, or restore it from a copy.
    """
    descriptor = _locked_file(path)
    try:
        descriptors = [descriptor, *_locked_folder(path)]
    except BaseException:
        os.close(descriptor)
        raise
    _name_holder(descriptor)
    return descriptors


def _locked_folder(path: Path) -> list[int]:
    """Return the descriptor of the folder of a file, locked; nothing where it cannot be."""
    if fcntl is None:
        return []
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
    except OSError:
        return []
    try:
        _change(descriptor, lock=True)
    except OSError as error:
        os.close(descriptor)
        if error.errno in {errno.EAGAIN, errno.EWOULDBLOCK}:
            raise _refusal(path, "one process, and another process has it") from error
        return []
    return [descriptor]


def _locked_file(path: Path) -> int:
    while True:
        if is_link(path):  # not every system can refuse to follow it
            raise OSError(f"{path} is a symbolic link")
        descriptor = os.open(path, FLAGS, 0o644)
        try:
            _lock_or_refuse(descriptor, path)
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # somebody has removed the file meanwhile: lock the new one


def _lock_or_refuse(descriptor: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(f"{path} is not a file")
    try:
        _change(descriptor, lock=True)
    except OSError as error:
        if error.errno in HELD:
            raise _refusal(
                path, f"one process, and process {_holder(descriptor)} has it"
            ) from error
        logger.warning(  # some network file systems have no locks
            "%s cannot be locked, so another process could use the directory too: %s", path, error
        )


def _change(descriptor: int, *, lock: bool) -> None:
    """Lock or unlock an open file, without waiting.

    Not with a POSIX record lock: a process loses that when it closes any descriptor of the file,
    and it does not hold off the process itself.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if lock else fcntl.LOCK_UN)
    elif msvcrt is not None:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK if lock else msvcrt.LK_UNLCK, 1)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _name_holder(descriptor: int) -> None:
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    with contextlib.suppress(OSError):  # on a full disk too, the lock holds
        os.truncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()} on {platform.node()}, since {since},".encode())


def _holder(descriptor: int) -> str:
    """Return what the holder has written into the file, which may be anything."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    text = os.read(descriptor, 256).decode(errors="replace")
    printable = "".join(filter(str.isprintable, text))
    return printable.strip() or "unknown"


def _refusal(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"directory {path.parent} must be used by {reason}. Wait for its end, or use another "
        "directory."
    )


def _forget() -> None:
    """Close the files of the parent's locks in a process that it has forked.

    As long as one descriptor is open the lock holds: a loader's worker would keep it after the
    parent's end. Closing one of two does not unlock.
    """
    for held in _held.values():
        for descriptor in held.descriptors:
            os.close(descriptor)
    _held.clear()
    _guard.release()


if hasattr(os, "register_at_fork"):
    # The guard keeps a thread from forking between the opening of a file and its listing.
    os.register_at_fork(
        before=_guard.acquire, after_in_parent=_guard.release, after_in_child=_forget
    )
