"""One process group on one run's folder."""

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
    """Holds a folder for this process; the system lets it go when the process ends, however.

    Args:
        directory: made if it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the folder.

        Raises:
            CheckpointError: if another process has it, or it cannot be written.
        """
        if self._descriptor is not None or fcntl is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"the run's folder {self._path.parent} cannot be written: {error}; give "
                "another folder, or make this one writable"
            ) from error
        try:
            # Not flock: a loader's worker would inherit it, and outlive a killed parent by seconds.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 256).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            if error.errno not in HELD:  # some network file systems have no locks
                logger.warning("%s cannot be locked against a second run: %s", self._path, error)
                return
            raise CheckpointError(
                f"the run's folder {self._path.parent} must belong to one process, and process "
                f"{holder} has it: wait for its end, or take another folder"
            ) from error
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {platform.node()}".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Let the folder go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
