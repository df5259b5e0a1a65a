"""One function on one event, and what it has cost so far."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from ignite.engine import Engine


@attrs.define(eq=False)
class Listener:
    """A function on an event, and what it has cost so far.

    Attributes:
        event: the event, with its filter where it has one.
        function: what was added, called with the engine where `takes_engine`.
        arguments: given after the engine.
        keywords: given by name.
        takes_engine: whether the engine comes first.
        period: iterations between two calls, for what `every` has added.
        entry: what stands for it in Ignite's own table.
        plain: whether the engine is all that it takes.
        calls: how often the event has reached it, or the filter in front of it.
        seconds: time on the host, without that of other listeners which it caused to be called.
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
        """Call the function with what it takes, and with what the event brings along."""
        first = (engine,) if self.takes_engine else ()
        self.function(*first, *arguments, *self.arguments, **self.keywords, **keywords)

    @property
    def name(self) -> str:
        """Whose function it is: `EarlyStopping._look`, or the function's own name."""
        parent = getattr(self.function, "_parent", None)  # Ignite's wrapper of a filtered handler
        function = self.function if parent is None else parent()
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", None)
        if owner is not None and name is not None:
            return f"{type(owner).__name__}.{name}"
        return name or type(function).__name__

    @property
    def cadence(self) -> str:
        """How often the event reaches it: `every=10`, or nothing for each time."""
        if self.period is not None:
            return f"every={self.period}"
        chosen = getattr(self.event, "filter", None)
        if chosen is None:
            return ""
        arguments = inspect.getclosurevars(chosen).nonlocals
        if not arguments:
            return str(getattr(chosen, "__name__", chosen))
        return ", ".join(f"{key}={value}" for key, value in sorted(arguments.items()))


def cost_table(listeners: list[Listener]) -> str:
    """Return a Markdown table of listeners: event, cadence, calls and time on the host."""
    lines = [
        "| handler | event | cadence | calls | ms | us a call |",
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
