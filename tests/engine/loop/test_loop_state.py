"""The position of a run: finished runs, other lengths, and state dicts."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events

from diptych.engine import MetricsEvents, ResumeError, RunEvents, SeededLoader
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
from tests.engine.models import stored

LENGTH = 4


def test_a_finished_run_says_so_and_does_nothing(caplog):
    loop, data = Tape(), range(LENGTH)
    loop.run(data, max_epochs=2)
    fired = events_of(loop, *Events)
    with caplog.at_level(logging.WARNING):
        state = loop.run(data, max_epochs=2)
    assert "Nothing to do" in caplog.text
    assert state is loop.state
    assert (fired, loop.rows) == ([], plain_rows(data, 2))


def test_a_finished_state_that_is_loaded_does_not_train_again(caplog):
    first, data = Tape(), range(LENGTH)
    first.run(data, max_epochs=2)
    second = Tape()
    second.load_state_dict(stored(first.state_dict()))
    second.run(data, max_epochs=2)
    assert second.rows == []
    assert "Nothing to do" in caplog.text
    second.run(data, max_epochs=3)
    assert second.rows == plain_rows(data, 3)[2 * LENGTH :]


def test_the_end_of_a_pass_is_announced_after_a_resume_between_two_epochs_too():
    whole, cut, resumed = Tape(), Tape(), Tape()
    logs = [
        events_of(loop, Events.DATALOADER_STOP_ITERATION, Events.EPOCH_STARTED)
        for loop in (whole, cut, resumed)
    ]
    states: list[dict[str, object]] = []
    cut.add_event_handler(RunEvents.SAFE_POINT, lambda loop: states.append(loop.state_dict()))
    whole.run(range(LENGTH), max_epochs=2)
    cut.run(range(LENGTH), max_epochs=1)
    resumed.load_state_dict(stored(states[-1]))
    resumed.run(range(LENGTH), max_epochs=2)

    assert logs[1] + logs[2] == logs[0]
    assert "DATALOADER_STOP_ITERATION" in logs[2]


def test_a_larger_max_epochs_continues_and_a_smaller_one_does_nothing():
    loop, data = Tape(), range(LENGTH)
    loop.run(data, max_epochs=2)
    loop.run(data, max_epochs=1)
    assert loop.rows == plain_rows(data, 2)
    loop.run(data, max_epochs=3)
    assert loop.rows == plain_rows(data, 3)


@pytest.mark.parametrize("stop", [2, LENGTH])
def test_max_epochs_none_starts_over(stop: int):
    loop, data = Tape(), range(LENGTH)
    handle = loop.add_event_handler(Events.ITERATION_COMPLETED(once=stop), loop.terminate)
    loop.run(data, max_epochs=1)
    handle.remove()
    loop.rows.clear()
    loop.state.max_epochs = None
    loop.run(range(3), max_epochs=2)
    assert loop.rows == plain_rows(range(3), 2)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_loader_of_another_length_continues_between_two_epochs_and_is_logged(resumed, caplog):
    loop = Tape()
    loop.run(range(LENGTH), max_epochs=1)
    if resumed:
        state, loop = loop.state_dict(), Tape()
        loop.load_state_dict(state)
    loop.rows.clear()
    loop.run(range(3), max_epochs=2)

    assert loop.rows == [(2, LENGTH + 1 + n, n) for n in range(3)]
    assert f"Epochs have 3 batches from here on; before, {LENGTH}." in caplog.text


def test_a_loader_of_another_length_is_refused_inside_an_epoch():
    loop = Tape()
    call_at(loop, 2, loop.terminate)
    loop.run(range(LENGTH), max_epochs=1)
    with pytest.raises(ResumeError, match=f"data must have {LENGTH} batches.* got 3"):
        loop.run(range(3), max_epochs=2)


def test_a_new_length_that_is_said_is_taken_between_two_epochs_and_refused_inside_one():
    loop = Tape()
    loop.run(range(LENGTH), max_epochs=1)
    loop.run(range(3), max_epochs=2, epoch_length=3)
    assert loop.rows == [*plain_rows(range(LENGTH), 1), (2, 5, 0), (2, 6, 1), (2, 7, 2)]
    call_at(loop, 8, loop.interrupt)
    data = range(3)
    loop.run(data, max_epochs=4)
    with pytest.raises(ResumeError):
        loop.run(data, max_epochs=4, epoch_length=2)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_number_of_iterations_stays_the_length_of_an_epoch(resumed):
    loop, data = Tape(), range(LENGTH)
    loop.run(data, max_epochs=1, epoch_length=3)
    if resumed:
        state, place, data = loop.state_dict(), loop.batches.place(), Positioned(LENGTH)
        loop = Tape()
        loop.load_state_dict(state)
        loop.set_data(data)
        data.load_state_dict({"position": place["given"]})
        loop.batches.restore({"position": place["given"]})
        loop.rows.extend((1, n + 1, n) for n in range(3))
    loop.run(data, max_epochs=2)

    assert [batch for *_, batch in loop.rows] == [0, 1, 2, 3, 0, 1]
    assert loop.state.epoch_length == 3


@given(stop=st.integers(0, 3 * LENGTH))
def test_a_position_saved_at_any_safe_point_continues_the_run_with_a_loader_that_can(stop: int):
    first, data = Tape(), Positioned(LENGTH)
    saved = {0: (first.state_dict(), data.state_dict())}
    first.add_event_handler(
        RunEvents.SAFE_POINT,
        lambda e: saved.update({e.state.iteration: (e.state_dict(), e.batches.position())}),
    )
    first.run(data, max_epochs=3)
    assert sorted(saved) == list(range(3 * LENGTH + 1))

    second, fresh = Tape(), Positioned(LENGTH)
    position, place = stored(saved[stop])

    @second.on(RunEvents.RESTORE)
    def restore(engine: Tape) -> None:
        engine.load_state_dict(position)
        if engine.epoch_iteration:
            engine.set_data(engine.state.dataloader)
            engine.batches.restore(place)

    fired = events_of(second, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED)
    second.run(fresh, max_epochs=3)
    assert second.rows == first.rows[stop:]
    assert second.state_dict() == first.state_dict()
    assert fired.count("EPOCH_STARTED") == 3 - -(-stop // LENGTH)
    assert fired.count("EPOCH_COMPLETED") == 3 - stop // LENGTH


def test_inside_an_epoch_a_loader_without_a_position_is_a_clear_error():
    first = Tape()
    call_at(first, 2, first.terminate)
    first.run(EpochAware(range(LENGTH)), max_epochs=2)
    second = Tape()
    second.load_state_dict(first.state_dict())
    with pytest.raises(
        ResumeError, match="stopped in epoch 1 after iteration 2, and this loader cannot"
    ):
        second.run(EpochAware(range(LENGTH)), max_epochs=2)
    with pytest.raises(ResumeError, match="needs a loader with load_state_dict"):
        second.batches.restore({"position": 2})
    assert second.rows == []


@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_position_saved_around_an_epoch_loses_no_epoch(event, epoch: int):
    first, saved = Tape(), []
    first.add_event_handler(event, lambda e: saved.append((len(e.rows), e.state_dict())))
    first.run(range(LENGTH), max_epochs=2)
    done, position = saved[min(epoch, len(saved)) - 1]
    second = Tape()
    second.load_state_dict(position)
    second.run(range(LENGTH), max_epochs=2)
    assert second.rows == first.rows[done:]


def test_a_position_saved_after_an_exception_in_the_loader_loses_no_epoch():
    class Broken(Unsized):
        def __iter__(self):
            raise OSError("no disk")

    first = Tape()
    with pytest.raises(OSError, match="no disk"):
        first.run(Broken([]), max_epochs=2)
    second = Tape()
    second.load_state_dict(first.state_dict())
    second.run(range(LENGTH), max_epochs=2)
    assert second.rows == plain_rows(range(LENGTH), 2)


@given(epochs=st.integers(1, 3), stop=st.integers(1, 3 * LENGTH))
def test_a_state_dict_makes_the_round_trip(epochs: int, stop: int):
    loop = Tape()
    call_at(loop, stop, loop.terminate)
    loop.run(range(LENGTH), max_epochs=epochs)
    other = Tape()
    other.load_state_dict(stored(loop.state_dict()))
    assert other.state_dict() == loop.state_dict()


def test_user_keys_travel_with_the_position_and_are_missed():
    loop = Tape()
    loop.state_dict_user_keys.append("alpha")
    loop.state.alpha = 0.25
    loop.run(range(LENGTH))
    other = Tape()
    other.state_dict_user_keys.append("alpha")
    other.load_state_dict(stored(loop.state_dict()))
    assert other.state.alpha == 0.25
    with pytest.raises(ResumeError, match="alpha"):
        other.load_state_dict({"iteration": 0, "epoch_length": 3, "max_epochs": 1})


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_iters": 3 * LENGTH}])
def test_an_ignite_engines_state_is_continued(limit):
    engine = Engine(lambda e, b: None)
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=2), engine.terminate)
    engine.run(range(LENGTH), **limit)
    loop = Tape()
    loop.load_state_dict(engine.state_dict())
    loop.run(range(LENGTH))
    assert loop.rows == plain_rows(range(LENGTH), 3)[2 * LENGTH :]


@pytest.mark.parametrize(
    "position",
    [
        {},
        {"iteration": 3},
        {"iteration": 3, "epoch_length": None, "max_epochs": 2},
        {"iteration": 3, "epoch_length": LENGTH},
    ],
)
def test_a_position_that_does_not_say_where_it_is_is_a_clear_error(position):
    with pytest.raises(ResumeError):
        Tape().load_state_dict(position)


def test_restore_handlers_see_the_new_loader_before_the_start_is_decided():
    loop, data, seen = Tape(), range(LENGTH), []
    loop.add_event_handler(RunEvents.RESTORE, lambda e: seen.append(e.state.dataloader))
    loop.run(data)
    assert seen == [data]


@pytest.mark.parametrize(
    ("state", "position"),
    [
        ({"iteration": 7, "epoch_length": 3, "max_epochs": 4}, (2, 7, 1)),
        ({"iteration": 6, "epoch_length": 3, "max_epochs": 4}, (2, 6, 0)),
        ({"epoch": 2, "epoch_length": 3, "max_epochs": 4}, (2, 6, 0)),
        ({"iteration": 0, "epoch_length": None, "max_iters": 5}, (0, 0, 0)),
    ],
)
def test_a_state_of_an_ignite_engine_places_the_run(state, position):
    loop = Tape()
    loop.load_state_dict(state)

    assert loop.position[:3] == position


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch_length": 3, "max_epochs": 4}, "'iteration' is absent"),
        ({"iteration": 3, "epoch_length": 3}, "exactly one of .*max_epochs.*max_iters"),
        ({"epoch": 3, "epoch_length": None, "max_epochs": 4}, "must be a positive integer"),
        ({"epoch": 3, "epoch_length": 2, "max_epochs": 2}, "greater than or equal to the start"),
        ({"epoch": 3, "iteration": 6, "epoch_length": 2, "max_epochs": 4}, "only one of"),
    ],
)
def test_an_incomplete_state_changes_nothing(state, message):
    loop = Tape()
    loop.run([0, 1], max_epochs=1)
    before = loop.state_dict()
    with pytest.raises(ResumeError, match=message):
        loop.load_state_dict(state)

    assert loop.state_dict() == before


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_iters": 7}])
def test_an_ignite_state_inside_an_epoch_goes_on_in_a_list_and_starts_the_epoch_again(limit):
    loop = Tape()
    fired = events_of(loop, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED)
    loop.load_state_dict({"iteration": 4, "epoch_length": 3, **limit})
    assert loop.state.epoch == 1  # as Ignite counts: epochs that are complete
    other = Tape()
    other.load_state_dict(stored(loop.state_dict()))
    for one in (loop, other):
        one.run([0, 1, 2])
        assert one.rows == plain_rows(range(3), 3)[4 : limit.get("max_iters", 9)]

    assert fired[:3] == ["EPOCH_STARTED", "EPOCH_COMPLETED", "EPOCH_STARTED"]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_position_inside_an_epoch_goes_on_in_a_new_seeded_loader(shuffle):
    def loader():
        return SeededLoader(range(6), 2, seed=3, shuffle=shuffle)

    def run(state=None, stop=None):
        loop, seen = EventLoop(lambda _, batch: seen.append(batch.tolist())), []
        if stop:
            loop.add_event_handler(Events.ITERATION_COMPLETED(once=stop), loop.terminate)
        if state:
            loop.load_state_dict(state)
        loop.run(loader(), max_epochs=3)
        return seen, loop.state_dict()

    whole, _ = run()
    start, state = run(stop=5)
    rest, _ = run(stored(state))
    assert [*start, *rest] == whole
    assert len(start) == 5


@pytest.mark.parametrize("limit", ["max_epochs", "max_iters"])
def test_a_state_names_the_limit_that_the_run_has_as_ignites_does(limit):
    states = []
    for one in (Tape(), Engine(lambda *_: None)):
        one.run(range(LENGTH), **{limit: 3})
        states.append(one.state_dict())

    assert set(states[1]) <= set(states[0])
    assert {"max_epochs", "max_iters"} & set(states[0]) == {limit}


@pytest.mark.parametrize("event", [Events.EPOCH_COMPLETED, MetricsEvents.EPOCH_PUBLISHED])
def test_a_state_that_is_taken_at_the_end_of_an_epoch_resumes_with_the_next_one(event):
    loop, states = Tape(), []
    loop.add_event_handler(event, lambda e: states.append(e.state_dict()))
    loop.run(range(3), max_epochs=2)
    other = Tape()
    completed = events_of(other, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED)
    other.load_state_dict(states[0])
    other.run(range(3), max_epochs=2)

    assert other.rows == loop.rows[3:]
    assert completed == ["EPOCH_STARTED", "EPOCH_COMPLETED"]


def test_a_state_inside_epoch_completed_names_the_handlers_to_come_once(caplog):
    def later() -> None:
        """Come after the state."""

    loop = Tape()
    loop.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state_dict())
    loop.add_event_handler(Events.EPOCH_COMPLETED, later)
    loop.run(range(3), max_epochs=2)

    assert caplog.text.count("before these handlers: later.") == 1


def test_a_state_after_a_failed_end_of_an_epoch_completes_it_again():
    loop, completed = Tape(), []

    def fail_once() -> None:
        completed.append(loop.state.epoch)
        if len(completed) == 1:
            raise ValueError("planted")

    loop.add_event_handler(Events.EPOCH_COMPLETED, fail_once)
    with pytest.raises(ValueError, match="planted"):
        loop.run(range(3), max_epochs=1)
    assert loop.state_dict()["epoch_iteration"] == 3
    loop.run(range(3), max_epochs=1)

    assert completed == [1, 1]
