"""An exception at the end of an epoch: the run continues with the handler that raised."""

from __future__ import annotations

from typing import Any

import pytest
from ignite.engine import Events

from diptych.engine import MetricsEvents, RunEvents, Trainer
from tests.handlers.runs import kept_records, loader, make_trainer


class BrokenError(Exception):
    """Raised once by a handler."""


def note_calls(trainer: Trainer, event: Any, broken: int | None) -> list[str]:
    """Add four handlers to an event; return the calls. One of them raises at its first call."""
    calls: list[str] = []
    left = [broken]

    def add(number: int) -> None:
        def act(engine: Trainer) -> None:
            if left == [number]:
                left.clear()
                raise BrokenError
            calls.append(f"{number} at {engine.state.iteration}")
            engine.metrics.update({f"own/{number}": engine.state.iteration})

        act.__name__ = act.__qualname__ = "act"  # equal names: their order tells them apart
        trainer.add_event_handler(event, act)

    for number in range(4):
        add(number)
    return calls


LIMITS = {
    Events.EPOCH_COMPLETED: {"max_epochs": 3},
    MetricsEvents.EPOCH_PUBLISHED: {"max_epochs": 3},
    RunEvents.EPOCH_CUT: {"max_iters": 8},
    MetricsEvents.CUT_PUBLISHED: {"max_iters": 8},
}


@pytest.mark.parametrize("resumed", [False, True], ids=["same process", "resumed"])
@pytest.mark.parametrize("broken", [0, 2, 3])
@pytest.mark.parametrize("event", LIMITS)
def test_each_handler_acts_once_and_what_it_publishes_is_reported_once(event, broken, resumed):
    whole = make_trainer()
    expected, records = note_calls(whole, event, None), kept_records(whole)
    whole.run(loader(), **LIMITS[event])

    cut, batches = make_trainer(), loader()
    calls, found = note_calls(cut, event, broken), kept_records(cut)
    with pytest.raises(BrokenError):
        cut.run(batches, **LIMITS[event])
    if resumed:
        states = cut.state_dict(), cut.metrics.state_dict(), dict(cut.state.metrics)
        other = make_trainer()
        rest = note_calls(other, event, None)
        later = kept_records(other)
        other.load_state_dict(states[0])
        other.metrics.load_state_dict(states[1])
        other.state.metrics.update(states[2])
        other.batches.switch(batches)
        other.batches.restore_place(cut.batches.place(), inside=other.inside_epoch)
        other.run(batches, **LIMITS[event])
        calls = calls + rest
        assert [r.values.keys() for r in found + later] == [r.values.keys() for r in records]
        cut = other
    else:
        cut.run(batches, **LIMITS[event])
        assert found == records
    assert calls == expected
    histories = [trainer.metrics.state_dict()["history"] for trainer in (cut, whole)]
    own = [{k: v for k, v in held.items() if k.startswith("own/")} for held in histories]
    assert own[0] == own[1]
    assert own[1] or event is MetricsEvents.CUT_PUBLISHED


def test_a_handler_that_is_called_every_few_iterations_is_not_called_again_either():
    trainer, calls = make_trainer(), []
    trainer.every(2, lambda _: calls.append("periodic"), Events.EPOCH_COMPLETED)
    broken = [True]

    def fail_once() -> None:
        if broken:
            broken.clear()
            raise BrokenError

    trainer.add_event_handler(Events.EPOCH_COMPLETED, fail_once)
    batches = loader()
    with pytest.raises(BrokenError):
        trainer.run(batches, max_epochs=1)
    trainer.run(batches, max_epochs=1)
    assert calls == ["periodic"]


def test_a_run_that_starts_over_forgets_where_it_was_left():
    trainer, batches = make_trainer(), loader()
    calls = note_calls(trainer, Events.EPOCH_COMPLETED, 2)
    with pytest.raises(BrokenError):
        trainer.run(batches, max_epochs=1)
    trainer.state.max_epochs = None
    trainer.run(batches, max_epochs=1)
    assert calls == ["0 at 6", "1 at 6", "0 at 6", "1 at 6", "2 at 6", "3 at 6"]


@pytest.mark.parametrize("resumed", [False, True], ids=["same process", "resumed"])
@pytest.mark.parametrize(
    "event", [Events.ITERATION_COMPLETED, MetricsEvents.EPOCH_PUBLISHED, RunEvents.EPOCH_CUT]
)
def test_a_run_that_was_to_end_before_the_exception_ends_after_the_event(event, resumed):
    limits, batches = LIMITS.get(event, {"max_epochs": 3}), loader()
    trainer = make_trainer()
    trainer.add_event_handler(event, trainer.terminate)
    calls = note_calls(trainer, event, 2)
    with pytest.raises(BrokenError):
        trainer.run(batches, **limits)
    if resumed:
        state, place, before = trainer.state_dict(), trainer.batches.place(), calls
        trainer = make_trainer()
        calls = note_calls(trainer, event, None)
        calls += before
        trainer.load_state_dict(state)
        trainer.batches.switch(batches)
        trainer.batches.restore_place(place, inside=trainer.inside_epoch)
    trainer.add_event_handler(Events.TERMINATE, lambda: calls.append("end"))
    trainer.run(batches, **limits)

    assert [call[:3] for call in calls] == ["0 a", "1 a", "2 a", "3 a", "end"]
