"""One place that runs everything which is due every n iterations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs
from ignite.engine import Engine

from diptych.engine.checks import is_whole
from diptych.engine.loop.listener import Listener


@attrs.define(eq=False)
class _Entry:
    period: int
    listener: Listener
    due: int = 0


class Periodic:
    """Calls each handler when the iteration is a multiple of its period.

    A filter of Ignite's own (`Events.ITERATION_COMPLETED(every=n)`) is asked on every iteration
    for every handler; here one comparison an iteration says that nothing is due. Due iterations
    follow from the iteration alone, so that a resumed run calls its handlers when the
    uninterrupted one would.

    Args:
        event: the one event that it listens to.
        call: calls listeners.
    """

    def __init__(self, event: Any, call: Callable[[Iterable[Listener]], object]) -> None:
        self._event, self._call = event, call
        self._entries: list[_Entry] = []
        self._due = 0
        self._seen = -1

    def add(self, period: int, handler: Callable[[Any], object]) -> None:
        """Add a handler that is called, with the engine, every `period` iterations.

        Raises:
            ValueError: if the period is no whole number of at least 1.
        """
        if not is_whole(period):
            raise ValueError(f"period must be a whole number of iterations >= 1, got {period!r}")
        self._entries.append(_Entry(period, Listener(self._event, handler, period=period)))
        self._due = 0

    @property
    def entries(self) -> tuple[_Entry, ...]:
        """Everything that was added, to be put back later."""
        return tuple(self._entries)

    @entries.setter
    def entries(self, entries: tuple[_Entry, ...]) -> None:
        self._entries, self._due = list(entries), 0

    @property
    def listeners(self) -> list[Listener]:
        """What was added, in order."""
        return [entry.listener for entry in self._entries]

    def __call__(self, engine: Engine) -> None:
        """Call what is due; the handler of the one event that this dispatcher stands for."""
        iteration = engine.state.iteration
        if self._seen < iteration < self._due:
            self._seen = iteration
            return
        self._dispatch(iteration)

    def _dispatch(self, iteration: int) -> None:
        # A jump back (a loaded state) makes every stored due iteration worthless.
        restarted = iteration <= self._seen
        self._seen = iteration  # now, so that a handler that fails finds its iteration repeated
        for entry in list(self._entries):
            if restarted or entry.due == 0 or iteration > entry.due:
                entry.due = -(-iteration // entry.period) * entry.period
            if iteration == entry.due:
                self._call((entry.listener,))
                entry.due += entry.period
        self._due = min(entry.due for entry in self._entries)
