"""The time that a run waits for its data, and the rule that warns if it is too long."""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import Any

import attrs
import torch

from diptych.engine.handler import Finding

RULE = "waiting for data"
REMEDY = (
    "Give the loader more workers (num_workers), let it pin its batches (pin_memory=True), make "
    "its work for each sample cheaper, or do that work on the device (Trainer(transform=...))."
)
SHORTEST_WAIT = 10.0
"""Seconds of waiting below which the rule is silent."""


class HostWait:
    """The total time between `start` and `stop`, on the host's clock."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = 0.0

    def start(self) -> None:
        """Start a wait."""
        self._since = perf_counter()

    def stop(self) -> None:
        """End the wait, if one has started."""
        if self._since is not None:
            self._seconds += perf_counter() - self._since
        self._since = None

    def read(self) -> float:
        """Return the seconds waited since `clear`."""
        return self._seconds

    def clear(self) -> None:
        """Set the total to 0."""
        self._since, self._seconds = None, 0.0


class DeviceWait:
    """The total time between `start` and `stop` in which a CUDA device is idle.

    Both record an event in the device's queue. If the device is still busy with earlier work, it
    reaches both events at the same time. If it is idle, it reaches the second one when `stop` is
    called. So a wait of the host while the device computes does not count. The events are recorded
    in its current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: Any = None
        self._waits: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0

    def start(self) -> None:
        """Start a wait."""
        self._began = self._now()

    def stop(self) -> None:
        """End the wait, if one has started."""
        if self._began is not None:
            self._waits.append((self._began, self._now()))
        self._began = None
        self._add_up()

    def read(self) -> float:
        """Return the idle seconds since `clear`, up to the last event that it has reached."""
        self._add_up()
        return self._seconds

    def clear(self) -> None:
        """Set the total to 0."""
        self._began, self._seconds = None, 0.0
        self._waits.clear()

    def _now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _add_up(self) -> None:
        """Read the waits that are over on the device, so that few events are kept."""
        while self._waits and self._waits[0][1].query():
            began, ended = self._waits.popleft()
            self._seconds += began.elapsed_time(ended) / 1e3


@attrs.define(eq=False)
class DataWaitRule:
    """Warns once if a run waits for its data for too large a share of its time.

    It fires when the share is above `share` at `patience` log points in a row, and these waits
    together have taken `SHORTEST_WAIT` seconds, so that short runs cause no warning.

    Args:
        share: of an iteration's time, in (0, 1].
        patience: log points, >= 1.
    """

    share: float
    patience: int
    _windows: list[tuple[float, float]] = attrs.field(factory=list, init=False, repr=False)
    _has_fired: bool = attrs.field(default=False, init=False, repr=False)

    def start(self) -> None:
        """Reset the rule for another run."""
        self._windows, self._has_fired = [], False

    def judge(self, step: int, waited: float, seconds: float) -> Finding | None:
        """Add the times between two log points; return a finding if the rule fires.

        The seconds include those that were `waited`.
        """
        if waited <= self.share * seconds:
            self._windows.clear()
            return None
        self._windows.append((waited, seconds))
        waited, seconds = (sum(column) for column in zip(*self._windows, strict=True))
        if self._has_fired or len(self._windows) < self.patience or waited < SHORTEST_WAIT:
            return None
        self._has_fired = True
        evidence = (
            f"there was no batch to compute on for {waited / seconds:.0%} of the time "
            f"({waited:.0f} of {seconds:.0f} s, {len(self._windows)} log points in a row)"
        )
        return Finding(RULE, step, evidence, REMEDY)
