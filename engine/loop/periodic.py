"""One listener for everything that is due every n iterations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs
from ignite.engine import Engine

from diptych.engine.checks import is_whole
from diptych.engine.loop.event_names import stepped_by
from diptych.engine.loop.listener import Listener


@attrs.define(eq=False)
class _Entry:
    period: int
    listener: Listener
    due: int = 0


class Periodic:
    """Calls each handler if the iteration is a multiple of its period.

    One of Ignite's filters (`Events.ITERATION_COMPLETED(every=n)`) is evaluated in every iteration
    for every handler. Here one comparison per iteration shows that nothing is due. Due iterations
    depend on the iteration alone, so a resumed run calls its handlers when the uninterrupted one
    would.
    """

    def __init__(self, event: Any, call: Callable[[Iterable[Listener]], object]) -> None:
        self._event, self._call = event, call
        self._entries: list[_Entry] = []
        self._due = 0
        self._seen = -1

    def add(self, period: int, handler: Callable[[Any], object]) -> None:
        """Add a handler that is called with the engine every `period` iterations.

        Raises:
            ValueError: if the period is not an integer >= 1.
        """
        if not is_whole(period):
            raise ValueError(f"period must be a whole number of iterations >= 1, got {period!r}")
        takes_engine = stepped_by(handler) is None
        listener = Listener(self._event, handler, takes_engine=takes_engine, period=period)
        self._entries.append(_Entry(period, listener))
        self._due = 0

    @property
    def entries(self) -> tuple[_Entry, ...]:
        """The handlers that were added; can be assigned to put them back."""
        return tuple(self._entries)

    @entries.setter
    def entries(self, entries: tuple[_Entry, ...]) -> None:
        """Put handlers back that were added before."""
        self._entries, self._due = list(entries), 0

    @property
    def listeners(self) -> list[Listener]:
        """The listeners of the handlers, in order."""
        return [entry.listener for entry in self._entries]

    def rests(self, iteration: int) -> bool:
        """Return whether nothing is due in an iteration, which is then done."""
        rests = self._seen < iteration < self._due
        if rests:
            self._seen = iteration
        return rests

    def __call__(self, engine: Engine) -> None:
        """Call the handlers that are due; this is the listener of the event."""
        iteration = engine.state.iteration
        # After a jump back (a loaded state), every stored due iteration is invalid.
        restarted = iteration <= self._seen
        self._seen = iteration  # before the calls, so that a failing handler is called again
        for entry in list(self._entries):
            if restarted or entry.due == 0 or iteration > entry.due:
                entry.due = -(-iteration // entry.period) * entry.period
            if iteration == entry.due:
                self._call((entry.listener,))
                entry.due += entry.period
        self._due = min(entry.due for entry in self._entries)


def flat(listeners: Iterable[Listener]) -> list[Listener]:
    """Return listeners in the order of their calls, with those that a `Periodic` holds."""
    found: list[Listener] = []
    for listener in listeners:
        periodic = listener.function
        found += periodic.listeners if isinstance(periodic, Periodic) else [listener]
    return found
