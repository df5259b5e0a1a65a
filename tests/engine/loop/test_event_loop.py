"""The run loop: lengths of epochs, loaders, and what fires when."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, EventEnum, Events

from diptych.engine import (
    EvaluationEvents,
    MetricsEvents,
    ResumeError,
    RunEvents,
    StepEvents,
    events,
)
from diptych.engine.loop.event_loop import EventLoop
from tests.engine.loop.loops import (
    EpochAware,
    Positioned,
    Tape,
    Unsized,
    call_at,
    events_of,
    plain_rows,
)
from tests.engine.models import paired, trainer_of


@given(length=st.integers(1, 5), epochs=st.integers(1, 4))
def test_a_run_equals_a_plain_double_loop(length: int, epochs: int):
    loop = Tape()
    state = loop.run(range(length), max_epochs=epochs)
    assert loop.rows == plain_rows(range(length), epochs)
    assert (state.epoch, state.iteration, state.epoch_length) == (epochs, length * epochs, length)
    assert loop.epoch_iteration == 0


def test_a_bare_run_is_one_epoch():
    loop = Tape()
    loop.run(range(3))
    assert loop.rows == plain_rows(range(3), 1)


def test_an_iterable_without_a_length_is_measured_in_each_epoch():
    loop, known = Tape(), []
    for event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED):
        loop.add_event_handler(event, lambda e: known.append(e.state.epoch_length))
    loop.run(Unsized("abc"), max_epochs=3)
    assert loop.rows == plain_rows("abc", 3)
    assert known == [None, 3] * 3


class Passes:
    """A loader whose passes differ in length; it has a length, and it may be a wrong one."""

    def __init__(self, *passes: int, says: Callable[[int], int | None]) -> None:
        self.passes, self.says, self.epoch = passes, says, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        length = self.says(self.epoch)
        if length is None:
            raise TypeError
        return length

    def __iter__(self) -> Iterator[int]:
        yield from range(1, self.passes[self.epoch % len(self.passes)] + 1)


lengths = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(lengths=lengths, kind=st.sampled_from(["right", "none", "too small", "too large"]))
def test_an_epoch_is_one_pass_however_long_and_whatever_the_loader_says(lengths, kind):
    says = {
        "right": lambda epoch: lengths[epoch % len(lengths)],
        "none": lambda epoch: None,
        "too small": lambda epoch: max(1, lengths[epoch % len(lengths)] - 1),
        "too large": lambda epoch: lengths[epoch % len(lengths)] + 2,
    }[kind]
    loop, data, ends = Tape(), Passes(*lengths, says=says), []
    loop.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: ends.append((e.epoch_iteration, e.state.epoch_length))
    )
    loop.run(data, max_epochs=len(lengths))

    assert ends == [(length, length) for length in lengths]
    assert [batch for *_, batch in loop.rows] == [n for x in lengths for n in range(1, x + 1)]


@pytest.mark.parametrize(("length", "found"), [(2, "more than 2"), (9, "4")])
def test_a_wrong_length_is_logged_once_with_the_way_out(length, found, caplog):
    Tape().run(Passes(4, says=lambda _: length), max_epochs=3)

    assert caplog.text.count(f"has the length {length}, but yields {found} batches") == 1
    assert "pass epoch_length=" in caplog.text


def test_a_length_that_is_too_small_does_not_carry_a_run_past_its_limit():
    loop, data = Tape(), Passes(4, says=lambda _: 2)
    call_at(loop, 2, loop.terminate)
    for _ in range(2):
        loop.run(data, max_iters=2)

    assert loop.state.iteration == 2
    loop.run(data, max_iters=5)
    assert [batch for *_, batch in loop.rows] == [1, 2, 3, 4, 1]


def test_a_right_length_that_varies_is_not_logged(caplog):
    Tape().run(Passes(4, 2, 3, says=lambda epoch: (4, 2, 3)[epoch]), max_epochs=3)

    assert caplog.text == ""


class LivingState(Positioned):
    """A loader with a length that is too small, whose state changes while it is read."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[int]:
        self.state: dict[str, list[int]] = {"read": []}
        for number in super().__iter__():
            self.state["read"].append(number)
            yield number

    def state_dict(self) -> dict[str, list[int]]:
        return self.state


def test_a_safe_point_at_a_length_that_is_too_small_has_the_position_of_its_iteration():
    loop, data, places = Tape(), LivingState(4), {}
    loop.add_event_handler(
        RunEvents.SAFE_POINT,
        lambda: places.setdefault(loop.state.iteration, copy.deepcopy(loop.batches.position())),
    )
    loop.run(data, max_epochs=1)

    assert [places[n]["read"] for n in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]


def test_a_loader_that_is_assigned_to_the_state_is_read_from_the_next_pass_on():
    loop = Tape()
    call_at(loop, 2, lambda: setattr(loop.state, "dataloader", "xyz"))
    loop.run("abc", max_epochs=2)

    assert [batch for *_, batch in loop.rows] == ["a", "b", "c", "x", "y", "z"]


def test_an_exhausted_iterator_can_be_replaced_when_it_stops():
    loop = Tape()
    loop.add_event_handler(
        Events.DATALOADER_STOP_ITERATION,
        lambda: setattr(loop.state, "dataloader", iter([4, 5, 6])),
    )
    loop.run(iter([1, 2, 3]), max_epochs=2)

    assert [batch for *_, batch in loop.rows] == [1, 2, 3, 4, 5, 6]


def test_a_generator_serves_one_epoch_and_a_second_is_a_clear_error():
    loop = Tape()
    loop.run((n for n in range(3)), max_epochs=1)
    assert loop.rows == plain_rows(range(3), 1)
    loop = Tape()
    with pytest.raises(ResumeError, match="must yield batches each time it is iterated"):
        loop.run((n for n in range(3)), max_epochs=2)


@pytest.mark.parametrize("empty", [[], range(0)])
def test_a_loader_of_length_zero_is_refused(empty):
    with pytest.raises(ValueError, match="at least one batch"):
        Tape().run(empty, max_epochs=1)


def test_an_empty_iterable_is_refused():
    with pytest.raises(ResumeError, match="must yield batches each time"):
        Tape().run(Unsized([]), max_epochs=1)


@given(length=st.integers(1, 5), epoch_length=st.integers(1, 9), epochs=st.integers(1, 4))
def test_epochs_shorter_or_longer_than_the_loader_go_on_through_it(
    length: int, epoch_length: int, epochs: int
):
    loop = Tape()
    loop.run(range(length), max_epochs=epochs, epoch_length=epoch_length)
    expected = [(n // epoch_length + 1, n + 1, n % length) for n in range(epoch_length * epochs)]
    assert loop.rows == expected


def test_no_data_gives_none_as_every_batch():
    loop = Tape()
    loop.run(epoch_length=2, max_epochs=2)
    assert loop.rows == plain_rows([None, None], 2)
    with pytest.raises(ValueError, match="epoch_length must be given"):
        Tape().run(max_epochs=1)


@given(length=st.integers(1, 4), limit=st.integers(1, 11))
def test_max_iters_ends_the_run_at_that_iteration(length: int, limit: int):
    loop = Tape()
    fired = events_of(loop, Events.EPOCH_COMPLETED, Events.COMPLETED, Events.TERMINATE)
    loop.run(range(length), max_iters=limit)
    assert loop.rows == plain_rows(range(length), limit)[:limit]
    assert fired == ["EPOCH_COMPLETED"] * (limit // length) + ["COMPLETED"]


def test_max_iters_can_be_raised_and_the_epoch_goes_on():
    loop, data = Tape(), range(4)
    loop.run(data, max_iters=6)
    loop.run(data, max_iters=9)
    assert loop.rows == plain_rows(data, 3)[:9]


def test_max_epochs_may_follow_max_iters():
    loop, data = Tape(), range(4)
    loop.run(data, max_iters=6)
    loop.run(data, max_epochs=2)
    assert loop.rows == plain_rows(data, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": 5}, TypeError, "data must be an iterable of batches, got a int"),
        ({"data": [1], "max_epochs": 1, "max_iters": 1}, ValueError, "mutually exclusive"),
        ({"data": [1], "max_epochs": 0}, ValueError, "max_epochs must be >= 1, got 0"),
        ({"data": [1], "max_iters": -1}, ValueError, "max_iters must be >= 1, got -1"),
        ({"data": [1], "epoch_length": 0}, ValueError, "epoch_length must be >= 1, got 0"),
    ],
)
def test_a_wrong_argument_names_itself(arguments, error, message):
    with pytest.raises(error, match=message):
        Tape().run(**arguments)


def test_the_loader_is_told_each_epoch_counted_from_zero():
    data = EpochAware("ab")
    Tape().run(data, max_epochs=3)
    assert data.told == [0, 1, 2]


def test_the_sampler_inside_the_loader_is_told_each_epoch():
    class Loader(list):
        sampler = EpochAware("")

    class Batched(list):
        batch_sampler = EpochAware("")

    for loader, told in ((Loader("ab"), Loader.sampler), (Batched("ab"), Batched.batch_sampler)):
        Tape().run(loader, max_epochs=3)
        assert told.told == [0, 1, 2]


@given(length=st.integers(1, 4), epoch_length=st.integers(1, 9))
def test_no_two_passes_over_the_loader_are_told_the_same_number(length: int, epoch_length: int):
    data = EpochAware(range(length))
    Tape().run(data, max_epochs=4, epoch_length=epoch_length)
    assert data.told == sorted(set(data.told))
    assert len(data.told) == -(-4 * epoch_length // length)


def test_epoch_started_fires_once_an_epoch_through_interrupts_and_terminations():
    loop, data = Tape(), range(3)
    fired = events_of(loop, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED)
    call_at(loop, 1, loop.interrupt)
    call_at(loop, 2, loop.terminate)
    call_at(loop, 6, loop.interrupt)
    for _ in range(4):
        loop.run(data, max_epochs=2)
    assert fired == ["EPOCH_STARTED", "EPOCH_COMPLETED"] * 2
    assert loop.rows == plain_rows(data, 2)


def test_the_safe_point_follows_every_handler_of_the_iteration_and_of_the_epoch():
    loop = Tape()
    fired: list[tuple[str, int]] = []
    for event in (RunEvents.SAFE_POINT, Events.EPOCH_COMPLETED, Events.ITERATION_COMPLETED):
        loop.add_event_handler(event, lambda e, n=event.name: fired.append((n, e.state.iteration)))
    loop.run(range(2), max_epochs=2)
    steps = [
        [("ITERATION_COMPLETED", n), ("SAFE_POINT", n)]
        if n % 2
        else [("ITERATION_COMPLETED", n), ("EPOCH_COMPLETED", n), ("SAFE_POINT", n)]
        for n in range(1, 5)
    ]
    assert fired == [pair for step in steps for pair in step]


def test_at_a_safe_point_the_counters_stand_between_two_iterations():
    loop = Tape()
    seen = []
    loop.add_event_handler(
        RunEvents.SAFE_POINT,
        lambda: seen.append((loop.state.epoch, loop.state.iteration, loop.epoch_iteration)),
    )
    loop.run(range(3), max_epochs=2)
    assert seen == [(1, 1, 1), (1, 2, 2), (1, 3, 0), (2, 4, 1), (2, 5, 2), (2, 6, 0)]


def test_terminate_epoch_ends_the_epoch_and_the_next_begins_a_new_pass():
    loop = Tape()
    call_at(loop, 2, loop.terminate_epoch)
    counts = []
    loop.add_event_handler(
        Events.TERMINATE_SINGLE_EPOCH, lambda _, iter_counter: counts.append(iter_counter)
    )
    fired = events_of(loop, Events.TERMINATE_SINGLE_EPOCH, Events.EPOCH_COMPLETED)
    loop.run(range(3), max_epochs=2)
    assert loop.rows == [(1, 1, 0), (1, 2, 1), (2, 3, 0), (2, 4, 1), (2, 5, 2)]
    assert fired == ["TERMINATE_SINGLE_EPOCH", "EPOCH_COMPLETED", "EPOCH_COMPLETED"]
    assert counts == [2]


def test_terminate_epoch_can_skip_epoch_completed():
    loop = Tape()
    call_at(loop, 2, lambda: loop.terminate_epoch(skip_epoch_completed=True))
    fired = events_of(loop, Events.EPOCH_COMPLETED)
    loop.run(range(3), max_epochs=2)
    assert len(fired) == 1


def test_terminate_epoch_at_the_epochs_end_leaves_the_next_epoch_alone():
    for event in (Events.EPOCH_COMPLETED, RunEvents.SAFE_POINT):
        loop = Tape()
        loop.add_event_handler(
            event, lambda engine: None if engine.epoch_iteration % 3 else engine.terminate_epoch()
        )
        loop.run(range(3), max_epochs=2)
        assert loop.rows == plain_rows(range(3), 2)


def test_set_data_takes_the_following_batches_from_the_new_loader():
    loop = Tape()
    call_at(loop, 2, lambda: loop.set_data("xyz"))
    loop.run("abc", max_epochs=2)
    assert [batch for *_, batch in loop.rows] == ["a", "b", "x", "x", "y", "z"]


EVERY_EVENT = [*Events, *StepEvents, *MetricsEvents, *EvaluationEvents, *RunEvents]


def test_the_events_fire_in_the_order_of_the_pseudocode():
    trainer = trainer_of(log_every=1)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: trainer.fire_event(EvaluationEvents.EVALUATED)
    )
    for event in EVERY_EVENT:  # an inner event is over before the outer one's later handlers run
        trainer.add_event_handler(event, lambda *_, name=event.name: order.append(name))
    order: list[str] = []
    trainer.run([paired(3), paired(3)], max_epochs=1)
    # EPOCH_COMPLETED is noted last among its handlers, after what it caused.
    order.remove("EPOCH_COMPLETED")
    order.insert(order.index("EVALUATED"), "EPOCH_COMPLETED")
    second = order.index("GET_BATCH_STARTED", order.index("GET_BATCH_STARTED") + 1)
    lines = (events.__doc__ or "").split("```")[1].splitlines()
    told = re.findall(r"[A-Z][A-Z_]+", " ".join(re.split(r"(?<=\S)  ", line)[0] for line in lines))
    outer = ("EPOCH_COMPLETED", "EVALUATED", "EPOCH_PUBLISHED", "SAFE_POINT", "COMPLETED")
    ends = ("TERMINATE", "INTERRUPT", "EXCEPTION_RAISED", "ENDED")
    elsewhere = {"EPOCH_CUT", "CUT_PUBLISHED", "BATCH_EVALUATED"}  # see the tests of those
    told = [name for name in told if name not in elsewhere]
    assert told == [*order[:second], *outer, *ends]
    assert order[-1] == "ENDED"
    assert [name for name in order[second:] if name in outer] == list(outer)


class Signal(EventEnum):
    """An event of a user's own."""

    RANG = "rang"


def test_filters_count_iterations_for_every_event_of_the_engine():
    for event in (*StepEvents, *MetricsEvents, *EvaluationEvents, *RunEvents):
        loop = Tape()
        every, once = [], []
        loop.add_event_handler(event(every=3), lambda e, seen=every: seen.append(e.state.iteration))
        loop.add_event_handler(event(once=4), lambda e, seen=once: seen.append(e.state.iteration))
        if event not in (RunEvents.SAFE_POINT, RunEvents.RESTORE):
            loop.add_event_handler(
                Events.ITERATION_COMPLETED, lambda e, event=event: e.fire_event(event)
            )
        loop.run(range(7), max_epochs=1)
        if event is not RunEvents.RESTORE:
            assert (every, once) == ([3, 6], [4])


def test_an_event_of_ones_own_is_registered_fired_and_filtered():
    loop = Tape()
    loop.register_events(*Signal, event_to_attr={Signal.RANG: "iteration"})
    rang = []
    loop.add_event_handler(Signal.RANG(every=2), lambda e: rang.append(e.state.iteration))
    loop.add_event_handler(Events.ITERATION_STARTED, lambda e: e.fire_event(Signal.RANG))
    loop.run(range(5))
    assert rang == [2, 4]


def test_firing_an_event_that_is_not_registered_is_refused():
    with pytest.raises(ValueError, match="event must be one that this engine fires, got nothing"):
        Tape().fire_event("nothing")


def test_handlers_get_the_arguments_that_an_ignite_engine_gives_them():
    def calls(make) -> list[tuple]:
        engine, seen = make(), []
        engine.add_event_handler(
            Events.STARTED, lambda e, a, k: seen.append((e is engine, a, k)), 1, k=2
        )
        engine.add_event_handler(Events.STARTED, lambda a: seen.append(("no engine", a)), 3)
        engine.add_event_handler(Events.COMPLETED, lambda: seen.append(()))
        engine.run([0])
        return seen

    assert calls(Tape) == calls(lambda: Engine(lambda e, b: None))
    assert len(calls(Tape)) == 3


def test_a_removed_handler_is_not_called():
    loop, seen = Tape(), []

    def note() -> None:
        seen.append(1)

    handle = loop.add_event_handler(Events.ITERATION_COMPLETED, note)
    call_at(loop, 2, handle.remove)
    loop.run(range(5))
    assert len(seen) == 2


@pytest.mark.parametrize("kind", [Engine, EventLoop])
def test_without_data_the_events_of_a_batch_do_not_fire(kind):
    loop = kind(lambda engine, batch: None)
    fired = events_of(loop, *Events)
    loop.run(max_epochs=2, epoch_length=3)

    assert "ITERATION_STARTED" in fired
    assert not {"GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "DATALOADER_STOP_ITERATION"} & {*fired}


PASSES = [([1, 2, 3], None)]
PASSES += [(data, length) for data in ([1, 2, 3], Unsized([1, 2, 3])) for length in range(2, 8)]


@pytest.mark.parametrize(("data", "epoch_length"), PASSES)
def test_each_new_pass_is_announced_where_ignite_announces_it(data, epoch_length):
    logs: list[list[Any]] = [[], []]
    for kind, log in zip((Engine, EventLoop), logs, strict=True):
        loop = kind(lambda engine, batch, log=log: log.append(batch))
        for event in Events:
            loop.add_event_handler(event, lambda *_, name=event.name, to=log, **__: to.append(name))
        loop.run(data, max_epochs=4, epoch_length=epoch_length)

    assert logs[0] == logs[1]
    assert "DATALOADER_STOP_ITERATION" in logs[0]


@pytest.mark.parametrize("kind", [Engine, EventLoop])
def test_the_times_of_epochs_and_the_run_include_their_handlers(kind):
    loop, seen = kind(lambda engine, batch: time.sleep(0.01)), {}
    times = loop.state.times

    def wait(engine: Any) -> None:
        event = engine.last_event_name.name
        seen[event] = times[event]
        time.sleep(0.05)

    loop.add_event_handler(Events.EPOCH_COMPLETED | Events.COMPLETED, wait)
    loop.run([1, 2], max_epochs=2)

    assert 0.02 <= seen["EPOCH_COMPLETED"] <= times["EPOCH_COMPLETED"] - 0.05
    assert 0.14 <= seen["COMPLETED"] <= times["COMPLETED"] - 0.05


@pytest.mark.parametrize("kind", [Engine, EventLoop])
def test_the_last_event_of_a_run_is_completed(kind):
    loop = kind(lambda engine, batch: None)
    loop.run([1, 2], max_epochs=2)

    assert loop.last_event_name is Events.COMPLETED


@pytest.mark.parametrize("kind", [Engine, EventLoop])
def test_a_subclass_sees_every_event_of_ignites_pass(kind):
    class Recorded(kind):
        def _fire_event(self, event_name, *arguments, **keywords):
            fired.append(event_name.name)
            return super()._fire_event(event_name, *arguments, **keywords)

    fired: list[str] = []
    loop = Recorded(lambda engine, batch: None)
    loop.add_event_handler(Events.ITERATION_COMPLETED(once=2), partial(loop.terminate, False))
    loop.run([1, 2, 3], max_epochs=2)

    iteration = [
        *("GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED", "ITERATION_COMPLETED"),
    ]
    assert fired == ["STARTED", "EPOCH_STARTED", *iteration * 2, "TERMINATE", "COMPLETED"]
