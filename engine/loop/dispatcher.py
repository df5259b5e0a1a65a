"""Who listens to which event: found at once when the event fires, and timed."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from ignite.engine import Engine, Events
from ignite.engine.events import RemovableEventHandle

from diptych.engine.distributed.hang_report import enter_place, leave_place, name_wait
from diptych.engine.loop.listener import Listener
from diptych.engine.loop.periodic import Periodic


class Dispatcher(Engine):
    """An Ignite `Engine` that calls an event's handlers at a small part of the cost.

    Ignite's events are hashed by their names, in Python, each time that one fires, and the public
    `fire_event` compares the name with all names there are. Here the event's identity leads to its
    listeners, and a clock is read between any two of them.
    """

    def __init__(self, process_function: Callable[[Engine, Any], Any]) -> None:
        self._listeners: dict[Any, list[Listener]] = {}
        self._found: dict[int, list[Listener]] = {}
        self._by_identity: dict[int, Any] = {}
        self._in_others = 0.0
        self._instead: Callable[[Listener], object] | None = None
        self._periodic: dict[Any, Periodic] = {}
        super().__init__(process_function)

    @property
    def listeners(self) -> list[Listener]:
        """All listeners: event by event, in the order in which they are called."""
        found: list[Listener] = []
        for listener in itertools.chain.from_iterable(self._listeners.values()):
            periodic = listener.function
            found += periodic.listeners if isinstance(periodic, Periodic) else [listener]
        return found

    def every(
        self, period: int, handler: Callable[[Any], object], event: Any = Events.ITERATION_COMPLETED
    ) -> None:
        """Call `handler(engine)` at `event` whenever the iteration is a multiple of `period`.

        All periodic handlers of an event share one dispatcher, which costs one comparison on an
        iteration where nothing is due. It stands where the first of them was added.

        Args:
            period: iterations between two calls.
            handler: called with this engine.
            event: an event that fires at most a few times an iteration.

        Raises:
            ValueError: if the period is no whole number of at least 1, or the event has a filter.
        """
        if getattr(event, "filter", None) is not None:
            raise ValueError(f"event must come without a filter, got {event!r}")
        if event not in self._periodic:
            self._periodic[event] = Periodic(event, self.call)
            self.add_event_handler(event, self._periodic[event])
        self._periodic[event].add(period, handler)

    def register_events(
        self, *event_names: Any, event_to_attr: dict[Any, str] | None = None
    ) -> None:
        """Register events of one's own, as Ignite's engines do."""
        super().register_events(*event_names, event_to_attr=event_to_attr)
        self._by_identity = {id(event): event for event in self._allowed_events}

    def add_event_handler(
        self, event_name: Any, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Add a handler to an event, as Ignite's engines do."""
        handle = super().add_event_handler(event_name, handler, *args, **kwargs)
        self._find_listeners()
        if getattr(event_name, "filter", None) is not None:
            self._listeners[event_name][-1].event = event_name
        return handle

    def remove_event_handler(self, handler: Callable[..., Any], event_name: Any) -> None:
        """Remove a handler from an event, as Ignite's engines do."""
        super().remove_event_handler(handler, event_name)
        self._find_listeners()

    def fire_event(self, event_name: Any) -> None:
        """Call the handlers of a registered event.

        Raises:
            ValueError: if the event is not registered.
        """
        self.last_event_name = event_name
        listeners = self._found.get(id(event_name))
        if listeners is None:
            listeners = self._find(event_name)
        if listeners:
            self.call(listeners)

    def fire_again(self, event_name: Any) -> None:
        """Call the handlers of an event that has fired in this iteration already.

        Those that choose their iterations, by `every` or by a filter, have been asked and are not
        called.
        """
        self.last_event_name = event_name
        listeners = self._listeners.get(event_name, ())
        self.call([listener for listener in listeners if not _chooses(listener)])

    def call(self, listeners: Iterable[Listener]) -> None:
        """Call these listeners with this engine, and count what each of them costs."""
        if self._instead is not None:
            for listener in listeners:
                self._instead(listener)
            return
        start = before = perf_counter()
        outer = self._in_others
        for listener in listeners:
            self._in_others = 0.0
            enter_place(listener)
            try:
                if listener.plain:
                    listener.function(self)
                else:
                    listener.call(self, (), {})
            except RuntimeError as error:
                name_wait(error, listener.name, before)
                raise
            finally:
                leave_place()
            now = perf_counter()
            listener.calls += 1
            listener.seconds += now - before - self._in_others
            before = now
        self._in_others = outer + before - start

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take back every listener that was added within this context if it raises."""
        entries = {event: list(found) for event, found in self._event_handlers.items()}
        listeners = {event: list(found) for event, found in self._listeners.items()}
        periodic = {event: (one, one.entries) for event, one in self._periodic.items()}
        try:
            yield
        except BaseException:
            self._event_handlers.clear()
            self._event_handlers.update(entries)
            self._listeners, self._found = listeners, {}
            self._periodic = {event: one for event, (one, _) in periodic.items()}
            for one, before in periodic.values():
                one.entries = before
            raise

    @contextmanager
    def calling(self, function: Callable[[Listener], object]) -> Iterator[None]:
        """Within this context, give each listener to a function in place of calling it."""
        self._instead = function
        try:
            yield
        finally:
            self._instead = None

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        if not event_args and not event_kwargs:
            self.fire_event(event_name)
            return
        self.last_event_name = event_name
        for listener in self._listeners.get(event_name, ()):
            listener.call(self, event_args, event_kwargs)

    def _find(self, event: Any) -> list[Listener]:
        self._assert_allowed_event(event)
        listeners = self._listeners.setdefault(event, [])
        if id(event) in self._by_identity:  # another object of that name may not outlive the call
            self._found[id(event)] = listeners
        return listeners

    def _find_listeners(self) -> None:
        """Take up what was added to, removed from or replaced in Ignite's own table."""
        for event, entries in self._event_handlers.items():
            known = self._listeners.setdefault(event, [])
            current = [_listener(event, entry, known) for entry in entries]
            if current[: len(known)] == known:
                known.extend(current[len(known) :])  # in place: an event that fires now has them
            else:
                self._listeners[event] = current
                self._found.clear()


def _listener(event: Any, entry: tuple[Any, ...], known: list[Listener]) -> Listener:
    """Return the listener of an entry in Ignite's table: a known one, or a new one."""
    for listener in known:
        if listener.entry is entry:  # one function may stand there twice, with other arguments
            return listener
    function, arguments, keywords = entry
    takes_engine = bool(arguments) and isinstance(arguments[0], weakref.ref)
    rest = arguments[1:] if takes_engine else arguments
    return Listener(event, function, rest, keywords, takes_engine, entry=entry)


def _chooses(listener: Listener) -> bool:
    filtered = getattr(listener.event, "filter", None) is not None
    return filtered or isinstance(listener.function, Periodic)
