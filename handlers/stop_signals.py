"""Signals that ask a run to end: noticed at once, answered where nothing is pending."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from diptych.engine.distributed import world_size

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1 (a scheduler's warning) for as long as it is installed.

    The first signal is noted and nothing else; the second of a kind acts as it would without this
    class. Over several ranks `received` is agreed on: each call starts a small all-reduce on the
    CPU and waits for the one before it, so that all ranks see a signal at the same iteration, one
    after it came.
    """

    def __init__(self) -> None:
        self._number = self._owner = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def install(self) -> None:
        """Begin to note signals; nothing happens outside the main thread, which alone gets them."""
        if world_size() > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is not threading.main_thread() or self._before:
            return
        self._owner = os.getpid()
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None:
                self._before[number] = signal.signal(number, self._note)

    def remove(self) -> None:
        """Put the handlers back that were there before."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()
        self._number = 0
        self._pending = None

    def received(self) -> int:
        """Return the number of the signal that came, the same on all ranks, or 0."""
        if world_size() == 1 or self._group is None:
            return self._number
        agreed = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            agreed = int(flag[0])
        flag = torch.tensor([self._number])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, flag)
        return agreed

    def _note(self, number: int, _: FrameType | None) -> None:
        forked = os.getpid() != self._owner  # a loader's worker, which its parent looks after
        if forked and number == signal.SIGINT:
            return
        if self._number or forked:
            signal.signal(number, self._before.get(number, signal.SIG_DFL))
            os.kill(os.getpid(), number)
            return
        self._number = number


def exit_error(number: int) -> BaseException:
    """Return what ends a process that a signal asked to end, with the code 128 + its number."""
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    return SystemExit(128 + number)
