"""Exceptions in handlers, steps and loaders: the next run goes on as if there had been none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Events

from diptych.engine import MetricsEvents, ResumeError, RunEvents
from diptych.engine.loop import continued_events
from diptych.engine.loop.event_loop import EventLoop
from tests.engine.loop.loops import Positioned, Unsized

CONTINUED = (
    Events.STARTED,
    Events.EPOCH_STARTED,
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
    RunEvents.SAFE_POINT,
    Events.EPOCH_COMPLETED,
    MetricsEvents.EPOCH_PUBLISHED,
    RunEvents.EPOCH_CUT,
    MetricsEvents.CUT_PUBLISHED,
    Events.TERMINATE,
    Events.INTERRUPT,
    Events.COMPLETED,
)
"""The events that a run after an exception continues."""
HANDLERS = 3
STOPS: dict[str, Callable[[EventLoop], object]] = {
    "terminate": lambda loop: loop.terminate(),
    "interrupt": lambda loop: loop.interrupt(),
    "terminate the epoch": lambda loop: loop.terminate_epoch(),
}


class PlantedError(Exception):
    """Raised where a test has planned it."""


@attrs.frozen
class Place:
    """A call: of a handler of an event, of the step, or of the loader; the nth of its kind."""

    name: str
    time: int


class Flaky(Positioned):
    """A loader with a position that calls a function before each batch."""

    def __init__(self, length: int, call: Callable[[], object]) -> None:
        super().__init__(length)
        self.call = call

    def before(self, index: int) -> None:
        self.call()


@attrs.define
class Story:
    """Runs a loop to its end, and logs what acts: a call that raises has not acted.

    Attributes:
        broken: the calls that raise, each once.
        stops: the call of `ITERATION_COMPLETED` after which the loop is asked to stop, and how.
    """

    broken: set[Place]
    stops: dict[int, str]
    log: list[Any] = attrs.field(factory=list)
    counts: Counter[str] = attrs.field(factory=Counter)

    def act(self, name: str, *entry: Any) -> None:
        """Log a call, unless it is to raise."""
        place = Place(name, self.counts[name] + 1)
        if place in self.broken:
            self.broken.remove(place)
            raise PlantedError(name)
        self.counts[name] += 1
        self.log.append((name, *entry))

    def loop(self) -> EventLoop:
        """Return a loop with three handlers of each event, and periodic ones of the safe point."""
        loop = EventLoop(
            lambda engine, batch: self.act(
                "step", engine.state.iteration, engine.state.epoch, batch
            )
        )
        for event in CONTINUED:
            for number in range(HANDLERS):
                loop.add_event_handler(event, partial(self.handle, f"{event.name} {number}"))
        for period in (1, 2):
            loop.every(
                period, partial(self.handle, f"safe point every {period}"), RunEvents.SAFE_POINT
            )
        loop.add_event_handler(Events.ITERATION_COMPLETED, self.stop)
        return loop

    def handle(self, name: str, loop: EventLoop) -> None:
        """Log the call of a handler with the position."""
        self.act(name, loop.state.epoch, loop.state.iteration, loop.epoch_iteration)

    def stop(self, loop: EventLoop) -> None:
        """Ask the loop to stop if it is time to."""
        if loop.state.iteration in self.stops:
            STOPS[self.stops[loop.state.iteration]](loop)

    def play(self, loader: str, limits: dict[str, int]) -> list[Any]:
        """Run until nothing is left to do; return the log."""
        loop, data = self.loop(), self.data(loader)
        for _ in range(40):
            before = len(self.log), set(self.broken)
            try:
                loop.run(data, **limits)
            except PlantedError:
                continue
            if (len(self.log), self.broken) == before:
                return self.log
        raise AssertionError("the run does not end")

    def data(self, loader: str) -> Any:
        """Return a loader of three batches."""
        if loader == "with a position":
            return Flaky(3, partial(self.act, "fetch"))
        return [0, 1, 2] if loader == "list" else Unsized([0, 1, 2])


NAMES = [
    "step",
    "fetch",
    *(f"{event.name} {number}" for event in CONTINUED for number in range(HANDLERS)),
    *(f"safe point every {period}" for period in (1, 2)),
]
places = st.builds(Place, st.sampled_from(NAMES), st.integers(1, 7))
limits = st.one_of(
    st.fixed_dictionaries({"max_epochs": st.integers(1, 3)}),
    st.fixed_dictionaries({"max_iters": st.integers(1, 8)}),
)
lengths = st.one_of(st.just({}), st.fixed_dictionaries({"epoch_length": st.integers(1, 5)}))


@settings(max_examples=250)
@given(
    st.sampled_from(["list", "without length", "with a position"]),
    limits,
    lengths,
    st.dictionaries(st.integers(1, 8), st.sampled_from(sorted(STOPS)), max_size=2),
    st.sets(places, min_size=1, max_size=4),
)
def test_a_run_with_exceptions_acts_as_one_without(loader, limits, lengths, stops, broken):
    expected = Story(set(), dict(stops)).play(loader, {**limits, **lengths})

    assert Story(set(broken), dict(stops)).play(loader, {**limits, **lengths}) == expected


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, RuntimeError, StopIteration])
@pytest.mark.parametrize("event", CONTINUED[:9])
def test_any_exception_in_any_event_is_continued(event, kind):
    loop, calls, failures = EventLoop(lambda engine, batch: None), [], [kind("stop")]
    loop.add_event_handler(event, lambda: calls.append("first"))

    def fail_once() -> None:
        if failures:
            raise failures.pop()
        calls.append("second")

    loop.add_event_handler(event, fail_once)
    loop.add_event_handler(event, lambda: calls.append("third"))
    data = [0, 1]
    with pytest.raises(kind, match="stop"):
        loop.run(data)
    loop.run(data)
    assert calls == ["first", "second", "third"] * (len(calls) // 3)


def test_a_handler_that_is_removed_after_it_has_raised_is_left_out():
    loop, calls = EventLoop(lambda engine, batch: None), []

    def fail() -> None:
        raise PlantedError

    loop.add_event_handler(Events.ITERATION_COMPLETED, lambda: calls.append("first"))
    handle = loop.add_event_handler(Events.ITERATION_COMPLETED, fail)
    loop.add_event_handler(Events.ITERATION_COMPLETED, lambda: calls.append("last"))
    data = [0]
    with pytest.raises(PlantedError):
        loop.run(data)
    handle.remove()
    loop.run(data)
    assert calls == ["first", "last"]


def test_a_stop_that_an_exception_handler_asks_for_does_not_stop_the_next_run():
    failures = [PlantedError()]

    def step(engine: EventLoop, batch: int) -> None:
        if failures:
            raise failures.pop()

    loop, data = EventLoop(step), [0, 1]
    loop.add_event_handler(Events.EXCEPTION_RAISED, lambda error: loop.terminate())
    with pytest.raises(PlantedError):
        loop.run(data)
    loop.run(data)
    assert loop.state.iteration == 2


def test_over_ranks_a_run_after_an_exception_is_refused_until_a_state_is_loaded(monkeypatch):
    failures = [PlantedError()]

    def step(engine: EventLoop, batch: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(continued_events, "world_size", lambda: 2)
    loop, data = EventLoop(step), [0, 1]
    state = {"epoch": 0, "iteration": 0, "epoch_iteration": 0, "epoch_length": 2, "max_epochs": 1}
    with pytest.raises(PlantedError):
        loop.run(data)
    for _ in range(2):
        with pytest.raises(ResumeError, match="must be resumed from a checkpoint"):
            loop.run(data)
    loop.load_state_dict({**state, "max_iters": None})
    loop.run(data)
    assert loop.state.iteration == 2


def test_over_ranks_a_run_that_failed_before_its_first_epoch_may_start_again(monkeypatch):
    monkeypatch.setattr(continued_events, "world_size", lambda: 2)
    loop, failures = EventLoop(lambda engine, batch: None), [PlantedError()]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    loop.add_event_handler(Events.STARTED, fail_once)
    with pytest.raises(PlantedError):
        loop.run([0, 1])
    loop.run([0, 1])
    assert loop.state.iteration == 2
