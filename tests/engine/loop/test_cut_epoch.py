"""The end of a run: inside an epoch by `max_iters`, and `COMPLETED` that is still to fire."""

from __future__ import annotations

import logging

import pytest
from ignite.engine import Events

from diptych.engine import MetricsEvents, Outcome, RunEvents
from tests.engine.loop.loops import Positioned, Tape, Unsized, call_at, events_of, plain_rows
from tests.engine.models import paired, trainer_of

ENDS = (
    Events.EPOCH_COMPLETED,
    MetricsEvents.EPOCH_PUBLISHED,
    RunEvents.EPOCH_CUT,
    MetricsEvents.CUT_PUBLISHED,
    Events.TERMINATE,
    Events.COMPLETED,
)
CUT = ["EPOCH_CUT", "CUT_PUBLISHED", "COMPLETED"]
WHOLE = ["EPOCH_COMPLETED", "EPOCH_PUBLISHED"]


class PlantedError(Exception):
    """Raised once by a handler."""


@pytest.mark.parametrize(
    ("iterations", "ends"),
    [(2, CUT), (3, [*WHOLE, "COMPLETED"]), (4, [*WHOLE, *CUT]), (6, [*WHOLE, *WHOLE, "COMPLETED"])],
)
def test_a_run_that_max_iters_ends_inside_an_epoch_says_so_once(iterations, ends):
    loop = Tape()
    fired = events_of(loop, *ENDS)
    loop.run(range(3), max_iters=iterations)

    assert fired == ends


def test_a_loader_without_a_length_is_cut_too():
    loop = Tape()
    fired = events_of(loop, *ENDS)
    loop.run(Unsized(range(100)), max_iters=5)

    assert fired == CUT


def test_a_stopped_run_is_not_cut():
    for stop in ("terminate", "interrupt"):
        loop = Tape()
        call_at(loop, 2, getattr(loop, stop))
        fired = events_of(loop, RunEvents.EPOCH_CUT)
        loop.run(range(3), max_iters=5)
        assert fired == []


def test_a_larger_max_iters_continues_inside_the_cut_epoch():
    loop, data = Tape(), Positioned(3)
    fired = events_of(loop, *ENDS)
    loop.run(data, max_iters=2)
    loop.run(data, max_iters=6)

    assert loop.rows == plain_rows(range(3), 2)
    assert fired == [*CUT, *WHOLE, *WHOLE, "COMPLETED"]


@pytest.mark.parametrize("event", [RunEvents.EPOCH_CUT, Events.COMPLETED])
def test_an_exception_at_the_end_of_a_run_leaves_that_end_to_the_next_run(event):
    loop = Tape()

    def fail() -> None:
        if PlantedError not in seen:
            seen.append(PlantedError)
            raise PlantedError

    seen: list[type] = []
    fired = events_of(loop, Events.STARTED, *ENDS)
    loop.add_event_handler(event, fail)
    with pytest.raises(PlantedError):
        loop.run(range(3), max_iters=2)
    assert loop.outcome is Outcome.FAILED
    loop.run(range(3), max_iters=2)

    # The event continues with the handler that raised.
    assert fired == ["STARTED", *CUT]
    assert loop.outcome is Outcome.COMPLETED
    assert len(loop.rows) == 2


@pytest.mark.parametrize(
    ("saved_at", "ends"),
    [
        (RunEvents.SAFE_POINT, CUT),
        (MetricsEvents.CUT_PUBLISHED, CUT),
        (Events.COMPLETED, []),
    ],
)
def test_a_state_knows_how_far_the_end_of_the_run_has_come(saved_at, ends):
    loop, states = Tape(), []
    loop.add_event_handler(saved_at, lambda: states.append(loop.state_dict()))
    loop.run(Positioned(3), max_iters=2)
    later = Tape()
    fired = events_of(later, Events.STARTED, *ENDS)
    later.load_state_dict(states[-1])
    later.run(Positioned(3), max_iters=2)

    assert fired == ends


def test_a_process_that_ended_inside_completed_fires_it_alone():
    loop = Tape()
    loop.run(range(3), max_epochs=1)
    later = Tape()
    fired = events_of(later, *Events)
    later.load_state_dict(loop.state_dict())
    later.completed = False
    later.run(range(3), max_epochs=1)

    assert fired == ["COMPLETED"]
    assert later.completed
    assert later.outcome is Outcome.COMPLETED


def test_a_run_that_was_interrupted_at_its_last_epochs_end_completes_in_the_next_one(caplog):
    loop = Tape()
    loop.add_event_handler(Events.EPOCH_COMPLETED, loop.interrupt)
    fired = events_of(loop, Events.STARTED, Events.INTERRUPT, *ENDS)
    loop.run(range(3), max_epochs=1)
    assert loop.outcome is Outcome.INTERRUPTED
    with caplog.at_level(logging.WARNING):
        loop.run(range(3), max_epochs=1)
        assert not caplog.records
        loop.run(range(3), max_epochs=1)

    assert "Nothing to do" in caplog.text
    assert fired == ["STARTED", *WHOLE, "INTERRUPT", "COMPLETED"]


@pytest.mark.parametrize(
    ("stop", "event"),
    [(None, "COMPLETED"), ("terminate", "TERMINATE"), ("interrupt", "INTERRUPT")],
)
def test_the_handlers_of_the_end_see_the_outcome(stop, event):
    loop, seen = Tape(), {}
    for one in (Events.STARTED, Events.TERMINATE, Events.COMPLETED, Events.INTERRUPT):
        loop.add_event_handler(one, lambda _, name=one.name: seen.update({name: loop.outcome}))
    if stop is not None:
        call_at(loop, 2, getattr(loop, stop))
    loop.run(range(3), max_epochs=1)

    assert seen.pop("STARTED") is None
    assert seen[event] is loop.outcome
    assert set(seen.values()) == {loop.outcome}


def test_the_handlers_of_an_exception_see_a_failed_run():
    loop, seen = Tape({2: PlantedError()}), []
    loop.add_event_handler(Events.EXCEPTION_RAISED, lambda *_: seen.append(loop.outcome))
    with pytest.raises(PlantedError):
        loop.run(range(3), max_epochs=1)

    assert seen == [Outcome.FAILED]


def test_a_value_published_at_the_cut_belongs_to_the_last_iteration():
    trainer, seen = trainer_of(log_every=10), []
    trainer.add_event_handler(
        RunEvents.EPOCH_CUT, lambda: trainer.metrics.update({"own": trainer.state.iteration})
    )
    trainer.add_event_handler(
        MetricsEvents.CUT_PUBLISHED, lambda: seen.append(trainer.state.metrics["own"])
    )
    steps = []
    trainer.add_event_handler(
        MetricsEvents.LOGGED,
        lambda: steps.append((trainer.metrics.record.step, "own" in trainer.metrics.record.values)),
    )
    trainer.run([paired(3)] * 4, max_iters=2)

    assert seen == [2.0]
    assert steps == [(2, False), (2, True)]
    assert trainer.metrics.get_history("own") == [2.0]
