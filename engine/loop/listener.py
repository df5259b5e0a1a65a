"""A function added to an event, with its number of calls and its time."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from ignite.engine import Engine


@attrs.define(eq=False)
class Listener:
    """A function added to an event, with its number of calls and its time.

    Attributes:
        event: the event, with its filter if it has one.
        function: the function; its first argument is the engine if `takes_engine`.
        arguments: positional arguments after the engine.
        keywords: keyword arguments.
        takes_engine: whether the engine is the first argument.
        period: iterations between two calls, if `every` added it.
        entry: its entry in Ignite's own table.
        plain: whether the engine is its only argument.
        calls: how often the event reached it, or the filter in front of it.
        seconds: time on the host, without that of listeners which it caused to be called.
    """

    event: Any
    function: Callable[..., object]
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = attrs.field(factory=dict)
    takes_engine: bool = True
    period: int | None = None
    entry: tuple[Any, ...] | None = attrs.field(default=None, repr=False)
    plain: bool = attrs.field(init=False)
    calls: int = attrs.field(default=0, init=False)
    seconds: float = attrs.field(default=0.0, init=False)

    def __attrs_post_init__(self) -> None:
        self.plain = self.takes_engine and not self.arguments and not self.keywords

    def call(self, engine: Engine, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Call the function with its own arguments and those of the event."""
        first = (engine,) if self.takes_engine else ()
        self.function(*first, *arguments, *self.arguments, **self.keywords, **keywords)

    @property
    def added(self) -> Any:
        """The function as it was added, without Ignite's wrapper for a filter."""
        parent = getattr(self.function, "_parent", None)
        return parent() if isinstance(parent, weakref.ref) else self.function

    @property
    def owner(self) -> Any:
        """The object that the function is a method of, else the function itself."""
        return getattr(self.added, "__self__", self.added)

    @property
    def name(self) -> str:
        """The function's name, with the class that it belongs to: `EarlyStopping._judge`."""
        function = self.added
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", None)
        if owner is not None and name is not None:
            return f"{type(owner).__name__}.{name}"
        return name or type(function).__name__

    @property
    def cadence(self) -> str:
        """The iterations that it selects, such as `every=10`; empty for all."""
        if self.period is not None:
            return f"every={self.period}"
        chosen = filter_of(self.event)
        if chosen is None:
            return ""
        arguments = inspect.getclosurevars(chosen).nonlocals
        if not arguments:
            return str(getattr(chosen, "__name__", chosen))
        return ", ".join(f"{key}={value}" for key, value in sorted(arguments.items()))


def filter_of(event: Any) -> Callable[..., bool] | None:
    """Return the filter of an event (`every=`, `once=`, `event_filter=`), or None."""
    return getattr(event, "filter", None)


def cost_table(listeners: list[Listener]) -> str:
    """Return a Markdown table of listeners: event, cadence, calls, time on the host."""
    lines = [
        "| handler | event | cadence | calls | ms | us/call |",
        "|---|---|---|---:|---:|---:|",
    ]
    for listener in listeners:
        each = f"{listener.seconds / listener.calls * 1e6:,.1f}" if listener.calls else ""
        event = getattr(listener.event, "name", listener.event)
        lines.append(
            f"| `{listener.name}` | `{event}` | {listener.cadence} | {listener.calls:,} "
            f"| {listener.seconds * 1e3:,.1f} | {each} |"
        )
    return "\n".join(lines)
