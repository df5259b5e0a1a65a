"""The position as a value: the loop fires what the earlier one, built of flags, fired."""

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

from diptych.engine import Outcome, RunEvents, Trainer
from diptych.engine.loop.dispatcher import Dispatcher
from diptych.engine.loop.event_loop import EventLoop
from diptych.engine.loop.position import Phase, Position
from tests.engine.loop.previous_loop import PreviousLoop
from tests.engine.loops import Positioned, Unsized
from tests.engine.models import paired, trainer_of

WATCHED = (*Events, *RunEvents)
ACTIONS: dict[str, Callable[[Any], object]] = {
    "terminate": lambda loop: loop.terminate(),
    "terminate, skip COMPLETED": lambda loop: loop.terminate(skip_completed=True),
    "terminate the epoch": lambda loop: loop.terminate_epoch(),
    "terminate the epoch, skip EPOCH_COMPLETED": lambda loop: loop.terminate_epoch(
        skip_epoch_completed=True
    ),
    "interrupt": lambda loop: loop.interrupt(),
}
LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: [0, 1, 2],
    "without length": lambda: Unsized([0, 1, 2]),
    "with a position": lambda: Positioned(range(3)),
}


class PlantedError(Exception):
    """Raised by a handler that was told to."""


@attrs.frozen
class Act:
    """What a handler does when an event fires for the nth time."""

    event: Any
    time: int
    action: str


@attrs.frozen
class Call:
    """One call of `run`, and whether a new loop, loaded with the state, makes it."""

    limits: dict[str, int]
    elsewhere: bool


def played(kind: type[Dispatcher], loader: str, acts: list[Act], calls: list[Call]) -> list[Any]:
    """Return everything that fires, with the position, in a series of calls of `run`."""
    log: list[Any] = []
    counts: Counter[Any] = Counter()

    def note(event: Any, engine: Any, *_: object) -> None:
        counts[event] += 1
        log.append((event.name, engine.state.epoch, engine.state.iteration, engine.epoch_iteration))
        for act in acts:
            if (act.event, act.time) == (event, counts[event]):
                if act.action == "raise":
                    raise PlantedError
                ACTIONS[act.action](engine)

    def made() -> Any:
        loop = kind(lambda engine, batch: log.append(("step", batch)))
        for event in WATCHED:
            loop.add_event_handler(event, partial(note, event))
        # The loop with flags could not tell the last safe point apart for periodic handlers.
        loop.add_event_handler(RunEvents.SAFE_POINT(every=2), lambda: log.append("every 2"))
        return loop

    loop, data = made(), LOADERS[loader]()
    for call in calls:
        if call.elsewhere:
            state, place = loop.state_dict(), loop.batches.place()
            loop, data = made(), LOADERS[loader]()
            if state["max_epochs"] or state["max_iters"]:
                loop.load_state_dict(state)
                loop.set_data(data)
                try:
                    loop.batches.restore_place(place, inside=bool(loop.epoch_iteration))
                except Exception as error:
                    log.append(type(error).__name__)
        try:
            loop.run(data, **call.limits)
        except Exception as error:
            log.append(type(error).__name__)
        log.append(dict(loop.state_dict()))
    return log


EVENTS = [event for event in WATCHED if event not in {Events.EXCEPTION_RAISED}]
acts = st.builds(
    Act,
    st.sampled_from(EVENTS),
    st.integers(1, 7),
    st.sampled_from([*ACTIONS, "raise"]),
).filter(
    # An epoch that ends before its first iteration: see the test below.
    lambda act: not ("epoch" in act.action and act.event in {Events.STARTED, Events.EPOCH_STARTED})
)
limits = st.one_of(
    st.fixed_dictionaries({"max_epochs": st.integers(1, 4)}),
    st.fixed_dictionaries({"max_iters": st.integers(1, 9)}),
    st.fixed_dictionaries({"max_epochs": st.integers(1, 3), "epoch_length": st.integers(1, 5)}),
)
calls = st.lists(st.builds(Call, limits, st.booleans()), min_size=1, max_size=4)


@settings(max_examples=400)
@given(st.sampled_from(sorted(LOADERS)), st.lists(acts, max_size=3), calls)
def test_random_stops_fire_the_events_that_the_loop_with_flags_fired(loader, acts, calls):
    expected = played(PreviousLoop, loader, acts, calls)

    assert played(EventLoop, loader, acts, calls) == expected


def test_an_epoch_without_iterations_has_no_safe_point_of_its_own():
    loop = EventLoop(lambda engine, batch: None)
    safe_points: list[int] = []
    loop.add_event_handler(
        Events.EPOCH_STARTED, lambda e: e.terminate_epoch() if e.state.epoch == 2 else None
    )
    loop.add_event_handler(
        RunEvents.SAFE_POINT(every=3), lambda e: safe_points.append(e.state.iteration)
    )
    loop.run([0, 1, 2], max_epochs=2)

    assert safe_points == [3]


def test_a_position_names_what_comes_next():
    loop = EventLoop(lambda engine, batch: None)
    seen: dict[str, Position] = {}
    for event in (Events.STARTED, Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED):
        loop.add_event_handler(
            event, lambda e, event=event: seen.setdefault(event.name, loop.position)
        )
    loop.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: seen.setdefault("EPOCH_COMPLETED", loop.position)
    )
    loop.run([0, 1], max_epochs=1)

    assert seen == {
        "STARTED": Position(0, 0, 0, Phase.BETWEEN_EPOCHS),
        "GET_BATCH_COMPLETED": Position(1, 0, 0, Phase.BEFORE_STEP),
        "ITERATION_STARTED": Position(1, 1, 0, Phase.BEFORE_STEP),
        "EPOCH_COMPLETED": Position(1, 2, 2, Phase.EPOCH_ENDED),
    }
    assert loop.position == Position(1, 2, 0, Phase.BETWEEN_EPOCHS)


def stop(how: str) -> Callable[[Trainer], None]:
    """Return a handler that stops a run."""

    def act(trainer: Trainer) -> None:
        if how == "raise":
            raise PlantedError
        if how != "nothing":
            ACTIONS[how](trainer)

    return act


@pytest.mark.parametrize(
    ("how", "outcome"),
    [
        ("nothing", Outcome.COMPLETED),
        ("terminate", Outcome.TERMINATED),
        ("terminate, skip COMPLETED", Outcome.TERMINATED),
        ("interrupt", Outcome.INTERRUPTED),
        ("raise", Outcome.FAILED),
    ],
)
def test_the_end_of_a_run_is_announced_once_with_its_outcome(how, outcome):
    trainer = trainer_of()
    ends: list[Outcome | None] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), stop(how))
    trainer.add_event_handler(RunEvents.ENDED, lambda: ends.append(trainer.outcome))
    try:
        trainer.run([paired(3)] * 4, max_epochs=1)
    except PlantedError:
        assert how == "raise"

    assert ends == [outcome]


def test_a_run_with_nothing_to_do_ends_as_completed():
    trainer = trainer_of()
    trainer.run([paired(3)], max_epochs=1)
    ends: list[Outcome | None] = []
    trainer.add_event_handler(RunEvents.RELEASE, lambda: ends.append(trainer.outcome))
    trainer.run([paired(3)], max_epochs=1)

    assert ends == [Outcome.COMPLETED]
