"""The dispatch of events to their listeners, with the time that each listener takes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

from ignite.engine import Engine, Events
from ignite.engine.events import RemovableEventHandle

from diptych.engine.distributed.hang_report import PLACES, raise_if_lost
from diptych.engine.loop.event_names import check_event, check_function, check_signature, stepped_by
from diptych.engine.loop.handler_table import Edited, HandlerTable
from diptych.engine.loop.listener import Listener, filter_of
from diptych.engine.loop.periodic import Periodic, flat


class StepMethod:
    """The `step` method of a scheduler or an optimizer, as a handler that takes no engine."""

    def __init__(self, owner: Any, method: Any) -> None:
        self.__self__, self.__name__, self._method = owner, method.__name__, method

    def __call__(self) -> None:
        """Step the scheduler or the optimizer."""
        self._method()

    def __eq__(self, other: object) -> bool:
        return (self.__self__, self.__name__) == (
            getattr(other, "__self__", None),
            getattr(other, "__name__", None),
        )

    def __hash__(self) -> int:
        return hash((id(self.__self__), self.__name__))


class Dispatcher(Engine):
    """An Ignite `Engine` that fires events at a fraction of the cost, and times the listeners.

    Ignite hashes an event by its name, in Python, each time it fires, and the public `fire_event`
    compares the name with every registered name. Here listeners are looked up by the identity of
    the event.
    """

    def __init__(self, process_function: Callable[[Engine, Any], Any]) -> None:
        self._listeners: dict[Any, list[Listener]] = {}
        self._found: dict[int, list[Listener]] = {}
        self._sources: dict[Any, Any] = {}  # the list of entries that a list of listeners follows
        self._by_identity: dict[int, Any] = {}
        self._in_others = 0.0
        self._instead: Callable[[Listener], object] | None = None
        self._periodic: dict[Any, Periodic] = {}
        self._raised: list[Listener] = []  # those that the last exception has passed through
        self._skipped: frozenset[int] = (
            frozenset()
        )  # ids of those that a continued event leaves out
        self._edited = Edited()
        super().__init__(process_function)
        self._event_handlers = HandlerTable(self._edited)

    @property
    def listeners(self) -> list[Listener]:
        """All listeners, event by event, in the order in which they are called."""
        if self._edited.since_read:
            self._find_listeners()
        return flat(itertools.chain.from_iterable(self._listeners.values()))

    def every(
        self, period: int, handler: Callable[[Any], object], event: Any = Events.ITERATION_COMPLETED
    ) -> None:
        """Call `handler(engine)` at `event` if the iteration is a multiple of `period`.

        All periodic handlers of an event share one listener, which costs one comparison in an
        iteration in which none of them is due. Its place among the event's listeners is that of
        the first periodic handler.

        Args:
            period: iterations between two calls, >= 1.
            handler: called with this engine.
            event: an event without a filter.

        Raises:
            ValueError: if the period is not an integer >= 1, or the event has a filter.
        """
        if filter_of(event) is not None:
            raise ValueError(f"event must not have a filter, got {event!r}. Pass the period alone")
        if event not in self._periodic:
            self._periodic[event] = Periodic(event, self.call)
            self.add_event_handler(event, self._periodic[event])
        self._periodic[event].add(period, handler)

    def register_events(
        self, *event_names: Any, event_to_attr: dict[Any, str] | None = None
    ) -> None:
        """Register events, as in Ignite."""
        super().register_events(*event_names, event_to_attr=event_to_attr)
        self._by_identity = {id(event): event for event in self._allowed_events}

    def add_event_handler(
        self, event_name: Any, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Add a handler to an event, as in Ignite.

        The `step` method of a scheduler or an optimizer is called without the engine, which it
        would take for an epoch or a closure.
        """
        check_function(event_name, handler)
        owner = None if args or kwargs else stepped_by(handler)
        if owner is not None:
            handler = StepMethod(owner, handler)
        try:
            handle = super().add_event_handler(event_name, handler, *args, **kwargs)
        except ValueError:
            check_signature(handler, self, *args, **kwargs)
            raise
        self._find_listeners()
        if filter_of(event_name) is not None:
            self._listeners[event_name][-1].event = event_name
        return handle

    def _assert_allowed_event(self, event_name: Any) -> None:
        check_event(event_name, self._allowed_events)

    def fire_event(self, event_name: Any) -> None:
        """Call the handlers of a registered event.

        Raises:
            ValueError: if the event is not registered.
        """
        self.last_event_name = event_name
        if self._edited.since_read:
            self._find_listeners()
        listeners = self._found.get(id(event_name))
        if listeners is None:
            listeners = self._find(event_name)
        if listeners:
            self.call(listeners)

    def fire_again(self, event_name: Any) -> None:
        """Fire an event a second time in one iteration.

        Handlers that select iterations, by `every` or by a filter, were called if they were due;
        they are not called again.
        """
        self.last_event_name = event_name
        listeners = self._listeners.get(event_name, ())
        self.call([listener for listener in listeners if not selects_iterations(listener)])

    def call(self, listeners: Iterable[Listener]) -> None:
        """Call listeners with this engine, and add up their calls and times."""
        if self._instead is not None:
            for listener in listeners:
                self._instead(listener)
            return
        if self._skipped:
            listeners = self._not_skipped(listeners)
        start = before = perf_counter()
        outer, places, edited = self._in_others, PLACES.stack, self._edited
        for listener in listeners:
            function = listener.function
            if type(function) is Periodic and function.rests(self.state.iteration):
                continue
            self._in_others = 0.0
            places.append((listener, before))
            try:
                if listener.plain:
                    function(self)
                else:
                    listener.call(self, (), {})
            except BaseException as error:
                self._note_raised(listener, error)
                raise
            finally:
                places.pop()
            now = perf_counter()
            listener.calls += 1
            listener.seconds += now - before - self._in_others
            before = now
            if edited.since_read:  # in this firing, as in Ignite
                self._find_listeners()
        self._in_others = outer + before - start

    def _note_raised(self, listener: Listener, error: BaseException) -> None:
        self._raised.append(listener)
        if isinstance(error, RuntimeError):
            raise_if_lost(error)

    def _not_skipped(self, listeners: Iterable[Listener]) -> list[Listener]:
        return [one for one in listeners if id(one) not in self._skipped]

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """If the context raises, remove the listeners that were added in it."""
        entries = {event: list(found) for event, found in self._event_handlers.items()}
        listeners = {event: list(found) for event, found in self._listeners.items()}
        periodic = {event: (one, one.entries) for event, one in self._periodic.items()}
        try:
            yield
        except BaseException:
            self._event_handlers.clear()
            for event, found in entries.items():
                self._event_handlers[event] = found
            self._listeners, self._found, self._sources = listeners, {}, {}
            self._periodic = {event: one for event, (one, _) in periodic.items()}
            for one, before in periodic.values():
                one.entries = before
            raise

    @contextmanager
    def calling(self, function: Callable[[Listener], object]) -> Iterator[None]:
        """Within this context, pass each listener to a function instead of calling it."""
        self._instead = function
        try:
            yield
        finally:
            self._instead = None

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        """Call the handlers of one of Ignite's events; subclasses may override it, as in Ignite."""
        if not event_args and not event_kwargs:
            self.fire_event(event_name)
            return
        self.last_event_name = event_name
        self._find_listeners()
        for listener in self._listeners.get(event_name, ()):
            listener.call(self, event_args, event_kwargs)

    def _find(self, event: Any) -> list[Listener]:
        self._assert_allowed_event(event)
        listeners = self._listeners.setdefault(event, [])
        if id(event) in self._by_identity:  # not a temporary object, whose id may be reused
            self._found[id(event)] = listeners
        return listeners

    def _find_listeners(self) -> None:
        """Follow what was added to, removed from or replaced in Ignite's own table.

        A list that was edited stays the same list of listeners, so that an event that is firing
        sees the edit; one that was replaced, as by `remove_event_handler`, is another list.
        """
        self._edited.since_read = False
        for event, entries in self._event_handlers.items():
            known = self._listeners.get(event, [])
            current = [_listener(self, event, entry, known) for entry in entries]
            if self._sources.get(event) is entries:
                known[:] = current
            else:
                self._listeners[event], self._sources[event] = current, entries
                self._found.clear()


def _listener(
    engine: Engine, event: Any, entry: tuple[Any, ...], known: list[Listener]
) -> Listener:
    """Return the listener of an entry in Ignite's table, a known one if there is one."""
    for listener in known:
        if _is_same(listener.entry, entry):
            return listener
    function, arguments, keywords = entry
    reference = arguments[0] if arguments and isinstance(arguments[0], weakref.ref) else None
    takes_engine = reference is not None and reference() is engine
    if reference is not None and not takes_engine:
        arguments, function = arguments[1:], partial(_call_with_referent, function, reference)
    rest = arguments[1:] if takes_engine else arguments
    return Listener(event, function, rest, keywords, takes_engine, entry=entry)


def _is_same(known: tuple[Any, ...] | None, entry: tuple[Any, ...]) -> bool:
    """Return whether two entries are one: a function may be added twice, with other arguments.

    When another handler is removed, Ignite makes new entries of the same parts.
    """
    return known is not None and all(a is b for a, b in zip(known, entry, strict=True))


def _call_with_referent(
    function: Callable[..., object], reference: weakref.ref[Any], *arguments: Any, **keywords: Any
) -> None:
    """Call a handler that was added for another engine."""
    engine = reference()
    if engine is None:
        raise RuntimeError(
            "Engine reference not resolved: the engine for which a handler was added is gone. "
            "Remove the handler, or keep its engine"
        )
    function(engine, *arguments, **keywords)


def selects_iterations(listener: Listener) -> bool:
    """Return whether a listener is called in chosen iterations only, by `every` or a filter."""
    filtered = filter_of(listener.event) is not None
    return filtered or isinstance(listener.function, Periodic)
