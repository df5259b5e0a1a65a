"""A watch over a rank that waits on a device, where no exception tells it that it waits in vain."""

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
from diptych.engine.distributed.hang_report import Place, current_place

logger = logging.getLogger(__name__)

SHARE = 0.8
"""Of the timeout: after which the watch speaks."""


@contextmanager
def monitored(timeout: timedelta) -> Iterator[None]:
    """Say where this thread stands, once it has stood there for most of the timeout.

    For backends whose collectives run on a device (NCCL): when one of them times out, a thread of
    the backend's ends the process, and no exception reaches the program. The place and the stack
    are logged before that.

    Cost: a thread that looks at the stack twenty times in a timeout.

    Args:
        timeout: of the process group, > 0.
    """
    seconds, done = timeout.total_seconds(), threading.Event()
    thread = threading.Thread(
        target=_watch, args=(threading.get_ident(), seconds, done), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(thread: int, timeout: float, done: threading.Event) -> None:
    told: Place | None = None
    while not done.wait(timeout / 20):
        place = current_place(thread)
        frame = sys._current_frames().get(thread)  # noqa: SLF001 - documented, for such uses
        if frame is None or place is None or place == told:
            continue
        name, since = place
        stood = perf_counter() - since
        if stood > SHARE * timeout:
            told = place
            logger.warning(
                "rank %d stands since %.1f s at: %s. It waits for another rank, or another rank "
                "for it; after %.1f s of waiting the backend ends the process. Its stack:\n%s",
                rank(),
                stood,
                name if isinstance(name, str) else name.name,
                timeout,
                "".join(traceback.format_stack(frame)),
            )
        del frame
