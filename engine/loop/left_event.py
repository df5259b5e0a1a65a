"""An event that an exception left before all of its handlers had run, and its continuation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from ignite.engine import Events

from diptych.engine.loop.listener import Listener
from diptych.engine.loop.periodic import flat


class LeftEvent(NamedTuple):
    """An event that was left, and its handlers that had returned by then.

    The next run continues with the handler that raised: one that had returned must not act twice.

    Attributes:
        event: the name of the event.
        done: the names of the handlers that had returned, in order.
        evaluated: those of `EVALUATED`, if that was left inside the event.
    """

    event: str
    done: tuple[str, ...] = ()
    evaluated: tuple[str, ...] = ()

    @property
    def in_iteration(self) -> bool:
        """Whether it is the event of an iteration, not of an epoch's end."""
        return self.event == Events.ITERATION_COMPLETED.name

    def state_dict(self) -> dict[str, Any]:
        """Return the event as strings, for a checkpoint."""
        return {"event": self.event, "done": list(self.done), "evaluated": list(self.evaluated)}


def left_event(state: Mapping[str, Any] | None) -> LeftEvent | None:
    """Return the event of a state that `LeftEvent.state_dict` returned; None of None."""
    if state is None:
        return None
    return LeftEvent(state["event"], tuple(state["done"]), tuple(state.get("evaluated", ())))


def returned(listeners: Iterable[Listener], raised: Collection[Listener]) -> tuple[str, ...] | None:
    """Return the names of the listeners before the one that raised; None if none of them did."""
    passed = {id(listener) for listener in raised}
    names: list[str] = []
    for listener in flat(listeners):
        if id(listener) in passed:
            return tuple(names)
        names.append(_name(listener))
    return None


def named(listeners: Iterable[Listener], names: Iterable[str]) -> frozenset[int]:
    """Return the identities of the listeners with the names; of several, the first as many."""
    wanted = Counter(names)
    found: set[int] = set()
    for listener in flat(listeners):
        if wanted[_name(listener)] > 0:
            wanted[_name(listener)] -= 1
            found.add(id(listener))
    return frozenset(found)


def _name(listener: Listener) -> str:
    return f"{listener.name} {listener.cadence}".rstrip()
