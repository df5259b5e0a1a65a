"""Runs that stop before their end: interrupts, terminations, exceptions, and what comes after."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from torch.utils.data import DataLoader, Dataset

from diptych.engine import ResumeError, RunEvents, StepEvents
from diptych.engine.loop.event_loop import EventLoop
from tests.engine.loop.loops import Positioned, Tape, Unsized, call_at, events_of, plain_rows
from tests.engine.models import paired, trainer_of

LENGTH, EPOCHS = 3, 3
LAST = LENGTH * EPOCHS
ENDS = (Events.STARTED, Events.INTERRUPT, Events.TERMINATE, Events.COMPLETED)
DURING = (Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED)


@given(stops=st.sets(st.integers(1, LAST)), sized=st.booleans())
def test_stopped_runs_continue_with_the_next_batch(stops: set[int], sized: bool):
    data = range(LENGTH) if sized else Unsized(range(LENGTH))
    interrupted, terminated = Tape(), Tape()
    fired = events_of(interrupted, *ENDS)
    for loop, stop in ((interrupted, interrupted.interrupt), (terminated, terminated.terminate)):
        for at in stops:
            call_at(loop, at, stop)
        for _ in range(len(stops) + 1):
            loop.run(data, max_epochs=EPOCHS)
        assert loop.rows == plain_rows(range(LENGTH), EPOCHS)
        assert loop.state.epoch == EPOCHS
    assert fired == ["STARTED", *["INTERRUPT"] * len(stops), "COMPLETED"]


def test_a_run_stopped_in_its_last_iteration_completes_its_epoch_when_it_goes_on():
    loop = Tape()
    call_at(loop, LENGTH, loop.terminate)
    fired = events_of(loop, Events.EPOCH_COMPLETED, Events.COMPLETED)
    for _ in range(3):
        loop.run(range(LENGTH), max_iters=LENGTH)
    assert fired == ["COMPLETED", "EPOCH_COMPLETED", "COMPLETED"]
    assert loop.state.iteration == LENGTH


def test_terminate_fires_terminate_and_completed_unless_told_not_to():
    for skip, expected in ((False, ["TERMINATE", "COMPLETED"]), (True, ["TERMINATE"])):
        loop = Tape()
        call_at(loop, 2, lambda loop=loop, skip=skip: loop.terminate(skip_completed=skip))
        fired = events_of(loop, *ENDS)
        loop.run(range(LENGTH), max_epochs=EPOCHS)
        assert fired == ["STARTED", *expected]


@pytest.mark.parametrize("event", DURING)
@pytest.mark.parametrize("method", ["terminate", "interrupt"])
def test_a_stop_asked_for_inside_an_iteration_waits_for_its_end(event, method):
    loop = Tape()
    fired = events_of(loop, RunEvents.SAFE_POINT)
    iteration = 2 if event is Events.ITERATION_STARTED else 1  # the iteration counts from there
    call_at(loop, iteration, getattr(loop, method), event)
    loop.run(range(LENGTH), max_epochs=EPOCHS)
    assert loop.rows == plain_rows(range(LENGTH), EPOCHS)[:2]
    assert fired == ["SAFE_POINT"] * 2


@pytest.mark.parametrize("method", ["terminate", "interrupt", "terminate_epoch"])
@pytest.mark.parametrize("kind", [Engine, EventLoop])
def test_a_stop_asked_for_before_a_batch_is_fetched_takes_effect_at_once(kind, method):
    seen = []
    loop = kind(lambda engine, batch: seen.append(batch))

    def stop_once(_: Engine) -> None:
        if fired.count("GET_BATCH_STARTED") == 2:
            getattr(loop, method)()

    loop.add_event_handler(Events.GET_BATCH_STARTED, stop_once)
    fired = events_of(loop, Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED)
    loop.run(range(3), max_epochs=2)

    assert seen == ([0, 1, 0, 1, 2] if method == "terminate_epoch" else [0, 1])
    assert fired[:5] == ["GET_BATCH_STARTED", "GET_BATCH_COMPLETED"] * 2 + ["GET_BATCH_STARTED"]


@pytest.mark.parametrize("method", ["terminate", "interrupt"])
def test_a_run_that_was_stopped_before_a_batch_continues_with_it(method):
    loop, data = Tape(), range(LENGTH)
    handle = loop.add_event_handler(Events.GET_BATCH_STARTED(once=2), getattr(loop, method))
    loop.run(data, max_epochs=EPOCHS)
    assert loop.state.iteration == 2
    handle.remove()
    loop.run(data, max_epochs=EPOCHS)

    assert loop.rows == plain_rows(data, EPOCHS)


@pytest.mark.parametrize("event", [Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED])
@pytest.mark.parametrize("kind", [Engine, EventLoop])
def test_an_epoch_that_ends_before_a_step_leaves_the_step_out(kind, event):
    seen = []
    loop = kind(lambda engine, batch: seen.append((engine.state.epoch, batch)))
    loop.add_event_handler(
        event,
        lambda e: e.terminate_epoch() if (e.state.epoch, e.state.iteration) == (2, 4) else None,
    )
    fired = events_of(loop, Events.TERMINATE_SINGLE_EPOCH, Events.EPOCH_COMPLETED)
    loop.run(range(3), max_epochs=3)

    assert seen == [*((1, n) for n in range(3)), (2, 0), *((3, n) for n in range(3))]
    assert fired == ["EPOCH_COMPLETED", "TERMINATE_SINGLE_EPOCH", *["EPOCH_COMPLETED"] * 2]
    assert loop.state.iteration == 7


@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_STARTED])
def test_a_stop_asked_for_before_the_first_iteration_runs_none(event):
    loop = Tape()
    handle = loop.add_event_handler(event, loop.terminate)
    loop.run(range(LENGTH), max_epochs=EPOCHS)
    assert loop.rows == []
    handle.remove()
    loop.run(range(LENGTH), max_epochs=EPOCHS)
    assert loop.rows == plain_rows(range(LENGTH), EPOCHS)


def test_a_run_stopped_in_the_last_iteration_of_an_epoch_completes_the_epoch_later():
    loop, data = Tape(), range(LENGTH)
    call_at(loop, LENGTH, loop.interrupt)
    fired = events_of(loop, Events.EPOCH_COMPLETED, RunEvents.SAFE_POINT, Events.COMPLETED)
    loop.run(data, max_epochs=1)
    assert fired == ["SAFE_POINT"] * LENGTH
    loop.run(data, max_epochs=1)
    assert fired[LENGTH:] == ["EPOCH_COMPLETED", "SAFE_POINT", "COMPLETED"]
    assert loop.rows == plain_rows(data, 1)


def test_another_loader_in_the_middle_of_an_epoch_is_a_clear_error_and_changes_nothing():
    loop, data = Tape(), list(range(LENGTH))
    call_at(loop, 2, loop.interrupt)
    loop.run(data, max_epochs=EPOCHS)
    for other in (list(data), None):
        with pytest.raises(ResumeError, match="stopped in epoch 1 after iteration 2"):
            loop.run(other, max_epochs=EPOCHS)
    loop.run(data, max_epochs=EPOCHS)
    assert loop.rows == plain_rows(data, EPOCHS)


def test_between_two_epochs_another_loader_of_the_same_length_takes_over():
    loop = Tape()
    loop.run("abc", max_epochs=1)
    loop.run("xyz", max_epochs=2)
    assert [batch for *_, batch in loop.rows] == list("abcxyz")


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, StopIteration])
@given(at=st.integers(1, LAST))
def test_an_exception_in_the_step_reaches_the_caller_and_the_batch_is_repeated(kind, at: int):
    loop, data = Tape({at: kind("broken")}), range(LENGTH)
    raised = []
    loop.add_event_handler(Events.EXCEPTION_RAISED, raised.append)
    with pytest.raises(kind, match="broken"):
        loop.run(data, max_epochs=EPOCHS)
    assert [type(error) for error in raised] == [kind]
    assert loop.state.iteration == at - 1
    loop.run(data, max_epochs=EPOCHS)
    assert loop.rows == plain_rows(data, EPOCHS)
    assert len(raised) == 1


def test_an_exception_handler_that_raises_again_is_called_once():
    loop = Tape({2: ValueError("broken")})
    calls = []

    def again(error: BaseException) -> None:
        calls.append(error)
        raise error

    loop.add_event_handler(Events.EXCEPTION_RAISED, again)
    with pytest.raises(ValueError, match="broken"):
        loop.run(range(LENGTH))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "event",
    [
        Events.STARTED,
        Events.EPOCH_STARTED,
        Events.GET_BATCH_STARTED,
        Events.GET_BATCH_COMPLETED,
        Events.ITERATION_STARTED,
        Events.ITERATION_COMPLETED,
        Events.EPOCH_COMPLETED,
        RunEvents.RESTORE,
        RunEvents.SAFE_POINT,
    ],
)
@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_in_a_handler_loses_and_repeats_no_batch(event, call: int):
    loop, data = Tape(), range(LENGTH)
    calls = []

    def fail_once() -> None:
        calls.append(event)
        if len(calls) == call:
            raise ValueError("broken handler")

    loop.add_event_handler(event, fail_once)
    if call == 2 and event in (Events.STARTED, RunEvents.RESTORE):
        loop.run(data, max_epochs=1)
    with pytest.raises(ValueError, match="broken handler"):
        loop.run(data, max_epochs=EPOCHS)
    loop.run(data, max_epochs=EPOCHS)
    assert loop.rows == plain_rows(data, EPOCHS)


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(LENGTH))
def test_a_loader_with_a_position_repeats_the_batch_that_it_failed_to_give(kind, at: int):
    loop, data = Tape(), Positioned(LENGTH, {at: kind("no disk")})
    raised = []
    loop.add_event_handler(Events.EXCEPTION_RAISED, raised.append)
    with pytest.raises(kind, match="no disk"):
        loop.run(data, max_epochs=EPOCHS)
    loop.run(data, max_epochs=EPOCHS)
    assert loop.rows == plain_rows(range(LENGTH), EPOCHS)
    assert len(raised) == 1


def test_an_iterator_that_survives_its_exception_goes_on():
    class Flaky(Unsized):
        failed = False

        def __iter__(self):
            self.rest = iter(self.values)
            return self

        def __next__(self):
            if not self.failed:
                self.failed = True
                raise OSError("no disk")
            return next(self.rest)

    loop, data = Tape(), Flaky(range(LENGTH))
    with pytest.raises(OSError, match="no disk"):
        loop.run(data, max_epochs=2)
    loop.run(data, max_epochs=2)
    assert loop.rows == plain_rows(range(LENGTH), 2)


def test_an_iterator_that_died_of_its_exception_is_a_clear_error_inside_the_epoch():
    class Dying(Unsized):
        failed = False

        def __iter__(self):
            for value in self.values:
                if value == 1 and not self.failed:
                    self.failed = True
                    raise OSError("no disk")
                yield value

    loop, data = Tape(), Dying(range(LENGTH))
    with pytest.raises(OSError, match="no disk"):
        loop.run(data, max_epochs=2)
    with pytest.raises(ResumeError, match="stopped in epoch 1 after iteration 1"):
        loop.run(data, max_epochs=2)
    assert loop.rows == plain_rows(range(LENGTH), 2)[:1]


class Samples(Dataset):
    """Numbers."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("workers", [0, 1])
def test_torchs_data_loader_continues_after_an_interrupt(workers: int):
    loop = Tape()
    data = DataLoader(Samples(), batch_size=2, num_workers=workers)
    call_at(loop, 3, loop.interrupt)
    loop.run(data, max_epochs=2)
    loop.run(data, max_epochs=2)
    assert [batch.tolist() for *_, batch in loop.rows] == [[0, 1], [2, 3], [4, 5], [6]] * 2


def test_a_repeated_batch_is_prepared_once():
    loop, data = Tape({2: ValueError("broken")}), range(LENGTH)
    for event in (Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED):
        loop.add_event_handler(
            event, lambda e: setattr(e.state, "batch", f"{e.state.batch} prepared")
        )
    with pytest.raises(ValueError, match="broken"):
        loop.run(data, max_epochs=2)
    loop.run(data, max_epochs=2)
    assert loop.rows == plain_rows([f"{n} prepared prepared" for n in data], 2)


def test_an_exception_in_a_trainers_step_changes_no_parameter():
    trainer, batches = trainer_of(), [paired(4) for _ in range(4)]
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}

    def fail() -> None:
        raise ValueError("stop here")

    handle = trainer.add_event_handler(StepEvents.GRADIENTS_READY, fail)
    with pytest.raises(ValueError, match="stop here"):
        trainer.run(batches, max_epochs=1)
    assert all(p.equal(before[n]) for n, p in trainer.model.named_parameters())
    handle.remove()
    trainer.run(batches, max_epochs=1)
    assert trainer.state.iteration == 4


def test_an_epoch_that_was_to_end_when_the_run_was_interrupted_ends_when_it_goes_on():
    loop, data = Tape(), range(5)

    def stop_both() -> None:
        loop.terminate_epoch()
        loop.interrupt()

    call_at(loop, 2, stop_both)
    loop.run(data, max_epochs=2)
    loop.run(data, max_epochs=2)
    assert (loop.state.iteration, loop.state.epoch) == (2 + 5, 2)


def test_an_epoch_that_was_to_end_in_the_last_iteration_of_a_run_ends_when_it_goes_on():
    loop, data = Tape(), range(5)

    def stop_both() -> None:
        loop.terminate_epoch()
        loop.terminate()

    call_at(loop, 2, stop_both)
    fired = events_of(loop, Events.EPOCH_COMPLETED)
    for _ in range(2):
        loop.run(data, max_iters=2)
    assert fired == ["EPOCH_COMPLETED"]
    assert loop.is_finished


@pytest.mark.parametrize("ending", ["unknown length", "terminate_epoch", "stop"])
def test_what_counts_safe_points_is_called_once_an_iteration_however_the_epoch_ends(ending: str):
    loop, counted, filtered, plain = Tape(), [], [], []
    data = Unsized(range(2)) if ending == "unknown length" else range(2 if ending == "stop" else 4)
    if ending != "unknown length":
        call_at(loop, 2, loop.terminate_epoch if ending == "terminate_epoch" else loop.terminate)
    loop.every(2, lambda e: counted.append(e.state.iteration), RunEvents.SAFE_POINT)
    loop.add_event_handler(
        RunEvents.SAFE_POINT(every=2), lambda e: filtered.append(e.state.iteration)
    )
    loop.add_event_handler(
        RunEvents.SAFE_POINT, lambda e: plain.append((e.state.iteration, e.epoch_iteration))
    )
    for _ in range(2 if ending == "stop" else 1):
        loop.run(data, max_epochs=1)
    assert counted == filtered == [2]
    assert plain[-1] == (2, 0)  # whoever saves finds the epoch ended
    assert len(plain) == (2 if ending == "terminate_epoch" else 3)


def test_a_run_that_starts_over_has_its_safe_points_again():
    loop, calls = Tape(), []
    loop.every(1, lambda e: calls.append(e.state.iteration), RunEvents.SAFE_POINT)
    for _ in range(2):
        loop.state.max_epochs = None
        loop.run(Unsized(range(1)), max_epochs=1)
    assert calls == [1, 1]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("ask", "event", "ends"),
    [("terminate", Events.COMPLETED, (2, 0)), ("terminate_epoch", Events.EPOCH_COMPLETED, (5, 1))],
)
def test_the_flag_of_a_stop_may_be_passed_by_position_as_in_ignite(ask, event, ends, skip):
    loop, completed = Tape(), []
    loop.add_event_handler(event, lambda: completed.append(1))
    loop.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: getattr(e, ask)(skip))
    loop.run([0, 1, 2], max_epochs=2)

    assert (loop.state.iteration, len(completed)) == (ends[0], ends[1] + (not skip))


def test_the_engine_that_an_event_passes_is_no_flag():
    loop, completed = Tape(), []
    loop.add_event_handler(Events.COMPLETED, lambda: completed.append(1))
    loop.add_event_handler(Events.ITERATION_COMPLETED(once=2), loop.terminate)
    loop.run([0, 1, 2], max_epochs=2)

    assert (loop.state.iteration, completed) == (2, [1])


def test_an_interrupted_run_is_no_longer_asked_to_interrupt():
    loop = Tape()
    loop.add_event_handler(Events.ITERATION_COMPLETED(once=2), loop.interrupt)
    loop.run([0, 1, 2], max_epochs=1)

    assert not loop.should_interrupt


class OneMore(Positioned):
    """Has one batch more than its length says."""

    def __len__(self) -> int:
        return self.length - 1


@pytest.mark.parametrize("resumed", [False, True])
def test_a_loader_that_fails_behind_an_epochs_length_loses_no_safe_point(resumed):
    loop, data, saved = Tape(), OneMore(4, {3: OSError("no disk")}), []
    loop.every(
        3,
        lambda e: saved.append((e.state.iteration, e.state_dict(), e.batches.place())),
        RunEvents.SAFE_POINT,
    )
    with pytest.raises(OSError, match="no disk"):
        loop.run(data, max_epochs=1)
    ((iteration, state, place),) = saved
    assert iteration == 3
    if resumed:
        rows, loop, data = loop.rows, Tape(), OneMore(4)
        loop.rows += rows
        loop.load_state_dict(state)
        loop.batches.switch(data)
        loop.batches.restore_place(place, inside=True)
    loop.run(data, max_epochs=1)

    assert loop.rows == plain_rows(range(4), 1)
    assert len(saved) == 1
