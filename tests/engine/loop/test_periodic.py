"""Periodic handlers: due exactly when a plain modulo says so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Events

from diptych.engine import RunEvents
from diptych.engine.loop.dispatcher import Dispatcher
from diptych.engine.loop.periodic import Periodic
from tests.engine.loop.loops import Tape, call_at

PERIODS = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@given(periods=PERIODS, jumps=st.lists(st.integers(0, 60), min_size=1, max_size=40))
def test_due_iterations_equal_a_plain_modulo_through_jumps_to_and_fro(
    periods: list[int], jumps: list[int]
):
    engine, calls = Dispatcher(lambda e, b: None), []
    periodic = Periodic(Events.ITERATION_COMPLETED, engine.call)
    for number, period in enumerate(periods):
        periodic.add(period, lambda e, n=number: calls.append((n, e.state.iteration)))
    expected = []
    for start in jumps:
        for iteration in range(start, start + 5):
            engine.state.iteration = iteration
            periodic(engine)
            expected += [(n, iteration) for n, p in enumerate(periods) if iteration % p == 0]
    assert calls == expected


@given(periods=PERIODS, length=st.integers(1, 5), stops=st.sets(st.integers(1, 20)))
def test_every_fires_like_a_modulo_in_a_run_that_stops_and_goes_on(
    periods: list[int], length: int, stops: set[int]
):
    loop, calls, data = Tape(), [], range(length)
    for number, period in enumerate(periods):
        loop.every(period, lambda e, n=number: calls.append((n, e.state.iteration)))
    for stop in stops:
        call_at(loop, stop, loop.interrupt)
    for _ in range(len(stops) + 1):
        loop.run(data, max_epochs=4)
    iterations = range(1, 4 * length + 1)
    assert calls == [(n, i) for i in iterations for n, p in enumerate(periods) if i % p == 0]


def test_every_fires_once_before_a_step_that_is_repeated():
    loop, calls, data = Tape({4: ValueError("broken")}), [], range(6)
    for name in "ab":
        loop.every(
            2, lambda e, n=name: calls.append((n, e.state.iteration)), Events.ITERATION_STARTED
        )
    with pytest.raises(ValueError, match="broken"):
        loop.run(data)
    loop.run(data)
    assert calls == [(n, i) for i in (2, 4, 6) for n in "ab"]


def test_every_continues_with_the_one_that_has_failed():
    loop, calls, data = Tape(), [], range(6)
    failures = [ValueError("broken")]

    def fail_once(_) -> None:
        if failures:
            raise failures.pop()

    loop.every(2, lambda e: calls.append(e.state.iteration), Events.ITERATION_STARTED)
    loop.every(2, fail_once, Events.ITERATION_STARTED)
    loop.every(3, lambda e: calls.append(-e.state.iteration), Events.ITERATION_STARTED)
    with pytest.raises(ValueError, match="broken"):
        loop.run(data)
    loop.run(data)
    assert calls == [2, -3, 4, 6, -6]


def test_every_takes_each_event_on_its_own():
    loop, calls = Tape(), []
    for event in (Events.ITERATION_COMPLETED, RunEvents.SAFE_POINT, Events.ITERATION_STARTED):
        loop.every(2, lambda e, n=event.name: calls.append((n, e.state.iteration)), event)
    loop.run(range(4))
    names = ["ITERATION_STARTED", "ITERATION_COMPLETED", "SAFE_POINT"]
    assert calls == [(name, i) for i in (2, 4) for name in names]


def test_a_handler_added_while_the_run_goes_is_called_from_then_on():
    loop, calls = Tape(), []
    call_at(loop, 4, lambda: loop.every(3, lambda e: calls.append(e.state.iteration)))
    loop.every(4, lambda e: None)
    loop.run(range(10))
    assert calls == [6, 9]


@pytest.mark.parametrize("period", [0, -1, 2.0, True, "2", None])
def test_a_period_that_is_no_number_of_iterations_is_refused(period):
    with pytest.raises(ValueError, match=r"period must be a whole number of iterations >= 1, got"):
        Tape().every(period, lambda e: None)


def test_every_refuses_an_event_that_has_a_filter_already():
    with pytest.raises(ValueError, match="must not have a filter"):
        Tape().every(2, lambda e: None, Events.ITERATION_COMPLETED(every=2))
