"""A monitor for ranks that hang in a collective on a device, where no exception is raised."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import perf_counter

from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.hang_report import Place, current_place, name_of

logger = logging.getLogger(__name__)

SHARE = 0.8
"""The fraction of the timeout after which the monitor logs a place."""


@contextmanager
def hangs_logged(timeout: timedelta) -> Iterator[None]:
    """Log the place and the stack of this thread if it stays at one place for most of a timeout.

    For backends whose collectives run on a device (NCCL): if one of them times out, a thread of the
    backend ends the process, and no exception reaches the program. The monitor logs before that.

    Cost: a thread that reads the current place twenty times in a timeout.
    """
    seconds, done = timeout.total_seconds(), threading.Event()
    thread = threading.Thread(
        target=_monitor, args=(threading.get_ident(), seconds, done), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _monitor(thread: int, timeout: float, done: threading.Event) -> None:
    logged: Place | None = None
    while not done.wait(timeout / 20):
        place = current_place(thread)
        frame = sys._current_frames().get(thread)  # noqa: SLF001 - documented, for such uses
        if frame is None or place is None or place == logged:
            continue
        name, since = place
        seconds = perf_counter() - since
        if seconds > SHARE * timeout:
            logged = place
            logger.warning(
                "Rank %d has been at one place for %.1f s: %s.\nIt waits for another rank, or is "
                "awaited; the backend ends the process after %.1f s. Its stack:\n%s",
                rank(),
                seconds,
                name_of(name),
                timeout,
                "".join(traceback.format_stack(frame)),
            )
        del frame
