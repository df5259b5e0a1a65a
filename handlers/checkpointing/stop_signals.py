"""Signals that ask a run to end: noted at once, answered at a safe point or in an evaluation."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
ECHO = 2.0
"""Seconds within which one signal may arrive twice: from a scheduler, and from a launcher that
forwards it."""


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1 (a scheduler's warning) while it is installed.

    The first signal is only noted; the second one acts as it would without this class. A signal
    that arrives again within two seconds counts once, unless it is SIGINT (Ctrl-C).

    Attributes:
        number: the number of the signal that this process received, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._owner = 0
        self._noted_at = 0.0
        self._answered = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Start noting signals; do nothing outside the main thread, the only one that gets them."""
        if threading.current_thread() is not threading.main_thread() or self._before:
            return
        self._owner = os.getpid()
        self._answered = False
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None:
                self._before[number] = signal.signal(number, self._note)

    def remove(self) -> None:
        """Restore the earlier signal handlers; a noted signal that was not answered acts now."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()
        number, self.number = self.number, 0
        if number and not self._answered:
            os.kill(os.getpid(), number)

    def answer(self, number: int) -> BaseException:
        """Return the exception that ends the process with the conventional code, 128 + number."""
        self._answered = True
        return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a loader's worker, which its parent ends
            if number == signal.SIGTERM:
                self._act(number, frame)
            return
        if not self.number:
            self.number, self._noted_at = number, time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - self._noted_at > ECHO:
            self._act(number, frame)

    def _act(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number, signal.SIG_DFL)
        if before == signal.SIG_IGN:  # as in a background job of a shell
            before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, before)
        if callable(before):  # os.kill may deliver the signal later
            before(number, frame)
        else:
            os.kill(os.getpid(), number)
