"""Loaders and a loop without a model, for tests of what runs when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ignite.engine import Events

from diptych.engine.loop.event_loop import EventLoop

Row = tuple[int, int, Any]
"""An epoch, an iteration and a batch."""


class Tape(EventLoop):
    """A loop whose step notes epoch, iteration and batch, and raises what it is told to.

    Attributes:
        rows: one for each finished step.
        failures: the exception to raise, once, by iteration.
    """

    def __init__(self, failures: Mapping[int, BaseException] | None = None) -> None:
        super().__init__(self._note)
        self.rows: list[Row] = []
        self.failures = dict(failures or {})

    def _note(self, _: Any, batch: Any) -> Any:
        state = self.state
        if state.iteration in self.failures:
            raise self.failures.pop(state.iteration)
        self.rows.append((state.epoch, state.iteration, batch))
        return batch


class Unsized:
    """Gives its values again and again, and has no length."""

    def __init__(self, values: Iterable[Any]) -> None:
        self.values = list(values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


class EpochAware(list):
    """A list that notes the epochs it is told."""

    def __init__(self, values: Iterable[Any]) -> None:
        super().__init__(values)
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)


class Positioned:
    """A loader of numbers that can say where it is, and go there; it fails where it is told to.

    Its iterator is a generator: it is of no use after an exception.
    """

    def __init__(self, length: int, failures: Mapping[int, BaseException] | None = None) -> None:
        self.length, self.position, self.start = length, 0, 0
        self.failures = dict(failures or {})

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        self.position = start
        for index in range(start, self.length):
            self.before(index)
            self.position = index + 1
            yield index

    def before(self, index: int) -> None:
        """Fail before a batch, if it is told to."""
        if index in self.failures:
            raise self.failures.pop(index)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self.position = self.start = state_dict["position"]


def plain_rows(batches: Iterable[Any], epochs: int) -> list[Row]:
    """Return what a plain double loop would note."""
    rows, iteration = [], 0
    batches = list(batches)
    for epoch in range(1, epochs + 1):
        for batch in batches:
            iteration += 1
            rows.append((epoch, iteration, batch))
    return rows


def call_at(
    loop: EventLoop, iteration: int, method: Any, event: Any = Events.ITERATION_COMPLETED
) -> None:
    """Call a method of the loop once, at the event, in the iteration."""
    loop.add_event_handler(event(once=iteration), method)


def events_of(loop: EventLoop, *events: Any) -> list[str]:
    """Return a list that takes down the name of each of these events, from now on."""
    fired: list[str] = []
    for event in events:
        loop.add_event_handler(event, lambda *_, name=event.name, **__: fired.append(name))
    return fired
