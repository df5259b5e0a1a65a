"""Signals that ask a run to end: noticed at once, answered where nothing is pending."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
ECHO = 2.0
"""Seconds in which a scheduler's signal may come once more: from the scheduler itself and from a
launcher that passes it on."""


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1 (a scheduler's warning) for as long as it is installed.

    The first signal is noted and nothing else; the second one acts as it would without this class.
    Other than an interrupt from the keyboard, a signal that comes again within two seconds is the
    first one's echo.

    Attributes:
        number: of the signal that came to this process, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._owner = 0
        self._noted_at = 0.0
        self._answered = False
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Begin to note signals; nothing happens outside the main thread, which alone gets them."""
        if threading.current_thread() is not threading.main_thread() or self._before:
            return
        self._owner = os.getpid()
        self._answered = False
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None:
                self._before[number] = signal.signal(number, self._note)

    def remove(self) -> None:
        """Put the handlers back that were there before; a signal that nobody answered acts now."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()
        number, self.number = self.number, 0
        if number and not self._answered:
            os.kill(os.getpid(), number)

    def answer(self, number: int) -> BaseException:
        """Return what ends a process that a signal asked to end, with the code 128 + its number."""
        self._answered = True
        return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a loader's worker, which its parent looks after
            if number == signal.SIGTERM:
                self._act(number, frame)
            return
        if not self.number:
            self.number, self._noted_at = number, time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - self._noted_at > ECHO:
            self._act(number, frame)

    def _act(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number, signal.SIG_DFL)
        if before == signal.SIG_IGN:  # as for a shell's background job; asked twice, it ends
            before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, before)
        if callable(before):  # at once: a signal to this process may take its time
            before(number, frame)
        else:
            os.kill(os.getpid(), number)
