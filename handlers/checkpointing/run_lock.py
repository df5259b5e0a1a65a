"""A lock that gives a run's directory to one process and its ranks."""

from __future__ import annotations

import errno
import logging
import os
import platform
from pathlib import Path

from diptych.engine.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NAME = "run.lock"
HELD = {errno.EACCES, errno.EAGAIN}


class RunLock:
    """Locks a directory for this process; the system unlocks it when the process ends.

    Args:
        directory: the directory; made if it does not exist.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Lock the directory.

        Raises:
            CheckpointError: if another process has locked it, or it cannot be written.
        """
        if self._descriptor is not None or fcntl is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"directory {self._path.parent} cannot be written: {error}. Use another directory, "
                "or make this one writable."
            ) from error
        try:
            # Not flock: a loader's worker inherits that, and outlives a killed parent by seconds.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 256).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            if error.errno not in HELD:  # some network file systems have no locks
                logger.warning(
                    "%s cannot be locked, so a second run could use the directory too: %s",
                    self._path,
                    error,
                )
                return
            raise CheckpointError(
                f"directory {self._path.parent} must be used by one process, and process {holder} "
                "has it. Wait for its end, or use another directory."
            ) from error
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {platform.node()}".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Unlock the directory."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
