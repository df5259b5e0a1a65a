"""How long a run waits for its data, and the rule that says when that is too long."""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import Any

import attrs
import torch

from diptych.handlers.health.rules import Finding

NAME = "waiting for data"
REMEDY = (
    "Give the loader more workers (num_workers), have it pin its batches (pin_memory=True), make "
    "what it does for a sample cheaper, or do it on the device (Trainer(transform=...))."
)
LEAST = 10.0
"""Seconds of waiting below which nothing is worth a word."""


class HostWait:
    """Adds up the time between `start` and `stop`."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = 0.0

    def start(self) -> None:
        """Begin to wait."""
        self._since = perf_counter()

    def stop(self) -> None:
        """End the wait, if one has begun."""
        if self._since is not None:
            self._seconds += perf_counter() - self._since
        self._since = None

    def read(self) -> float:
        """Return the seconds since `clear`."""
        return self._seconds

    def clear(self) -> None:
        """Begin at 0 again."""
        self._since, self._seconds = None, 0.0


class DeviceWait:
    """Adds up the time between `start` and `stop` in which a CUDA device has nothing to do.

    Both put an event into the device's queue. While the device is busy with what was queued before,
    it comes to both at one time; where it has run dry, it comes to the second when `stop` is
    called. A host that waits while the device computes costs nothing, and does not count.

    Args:
        device: whose current stream is watched.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: Any = None
        self._waits: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0

    def start(self) -> None:
        """Begin to wait."""
        self._began = self._now()

    def stop(self) -> None:
        """End the wait, if one has begun."""
        if self._began is not None:
            self._waits.append((self._began, self._now()))
        self._began = None
        self._add_up()

    def read(self) -> float:
        """Return the seconds since `clear`, of what the device has come to."""
        self._add_up()
        return self._seconds

    def clear(self) -> None:
        """Begin at 0 again."""
        self._began, self._seconds = None, 0.0
        self._waits.clear()

    def _now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add_up(self) -> None:
        """Read the waits that are over on the device, so that few events are in use."""
        while self._waits and self._waits[0][1].query():
            began, ended = self._waits.popleft()
            self._seconds += began.elapsed_time(ended) / 1e3


def wait_of(device: torch.device) -> HostWait | DeviceWait:
    """Return what measures the wait for data of a run on this device."""
    return DeviceWait(device) if device.type == "cuda" else HostWait()


@attrs.define(eq=False)
class DataWaitRule:
    """Says once when a run has waited for its data for too large a part of its time.

    It fires when the share is above `share` at `patience` log points in a row, and these waits
    together have taken `LEAST` seconds, so that a run of a moment is left in peace.

    Args:
        share: of an iteration's time, in (0, 1].
        patience: log points, >= 1.
    """

    share: float
    patience: int
    _windows: list[tuple[float, float]] = attrs.field(factory=list, init=False, repr=False)
    _told: bool = attrs.field(default=False, init=False, repr=False)

    def start(self) -> None:
        """Forget what was seen: another run begins."""
        self._windows, self._told = [], False

    def judge(self, step: int, waited: float, seconds: float) -> Finding | None:
        """Take the wait and the whole time between two log points; return what it means, if much.

        Args:
            step: the iteration of the second.
            waited: seconds.
            seconds: of both.
        """
        if waited <= self.share * seconds:
            self._windows.clear()
            return None
        self._windows.append((waited, seconds))
        waited, seconds = (sum(column) for column in zip(*self._windows, strict=True))
        if self._told or len(self._windows) < self.patience or waited < LEAST:
            return None
        self._told = True
        evidence = (
            f"there was no batch to compute on for {waited / seconds:.0%} of the time "
            f"({waited:.0f} of {seconds:.0f} s, {len(self._windows)} log points in a row)"
        )
        return Finding(NAME, step, evidence, REMEDY)
