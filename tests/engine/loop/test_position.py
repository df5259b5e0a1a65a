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
from ignite.engine import Engine, Events

from diptych.engine import Outcome, ResumeError, RunEvents
from diptych.engine.loop.dispatcher import Dispatcher
from diptych.engine.loop.event_loop import EventLoop
from diptych.engine.loop.position import Phase, Position
from tests.engine.loop.loops import Positioned, Unsized
from tests.engine.loop.previous_loop import PreviousLoop
from tests.engine.models import paired, trainer_of


class PlantedError(Exception):
    """Raised by a handler that was told to."""


def fail() -> None:
    """Raise the planted error."""
    raise PlantedError


WATCHED = (*Events, *RunEvents)
ACTIONS: dict[str, Callable[[Any], object]] = {
    "terminate": lambda loop: loop.terminate(),
    "terminate, skip COMPLETED": lambda loop: loop.terminate(skip_completed=True),
    "terminate the epoch": lambda loop: loop.terminate_epoch(),
    "terminate the epoch, skip EPOCH_COMPLETED": lambda loop: loop.terminate_epoch(
        skip_epoch_completed=True
    ),
    "interrupt": lambda loop: loop.interrupt(),
    "raise": lambda _: fail(),
}
LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: [0, 1, 2],
    "without length": lambda: Unsized([0, 1, 2]),
    "with a position": lambda: Positioned(3),
}


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


def has_pending_batch(loop: Any) -> bool:
    """Return whether a loop has fetched a batch that its step has not taken."""
    if isinstance(loop, PreviousLoop):
        return loop._batch_pending
    return loop.position.phase is Phase.BEFORE_STEP


@attrs.define
class Player:
    """Makes a series of calls of `run`, and logs everything that fires, with the position."""

    kind: type[Dispatcher]
    loader: str
    acts: list[Act]
    log: list[Any] = attrs.field(factory=list)
    counts: Counter[Any] = attrs.field(factory=Counter)

    def play(self, calls: list[Call]) -> list[Any]:
        """Return the log of the calls."""
        loop, data = self.made(), LOADERS[self.loader]()
        for call in calls:
            if call.elsewhere and not has_pending_batch(loop):  # else the state is not exact
                state, position = loop.state_dict(), loop.batches.place()
                loop, data = self.made(), LOADERS[self.loader]()
                if state.get("max_epochs") or state.get("max_iters"):
                    self.attempt(partial(self.load, loop, data, state, position))
            self.attempt(partial(loop.run, data, **call.limits))
            state = loop.state_dict().items()
            self.log.append({k: v for k, v in state if k not in {"counted", "left"}})
        return self.log

    def made(self) -> Any:
        """Return a loop whose events are logged."""
        loop = self.kind(lambda _, batch: self.log.append(("step", batch)))
        for event in WATCHED:
            loop.add_event_handler(event, partial(self.note, event))
        loop.add_event_handler(RunEvents.SAFE_POINT(every=2), lambda: self.log.append("every 2"))
        return loop

    def note(self, event: Any, loop: Any, *_: object, **__: object) -> None:
        """Log an event, and act if it is the time to."""
        self.counts[event] += 1
        self.log.append((event.name, loop.state.epoch, loop.state.iteration, loop.epoch_iteration))
        for act in self.acts:
            if (act.event, act.time) == (event, self.counts[event]):
                ACTIONS[act.action](loop)

    @staticmethod
    def load(loop: Any, data: Any, state: dict[str, Any], position: dict[str, Any]) -> None:
        """Restore a loop as a checkpoint does."""
        loop.load_state_dict(state)
        loop.batches.switch(data)
        inside = getattr(loop, "inside_epoch", bool(loop.epoch_iteration))
        loop.batches.restore_place(position, inside=inside)

    def attempt(self, function: Callable[[], object]) -> None:
        """Call a function, and log the exception that it raises."""
        try:
            function()
        except (PlantedError, ResumeError, ValueError) as error:
            self.log.append(type(error).__name__)


EVENTS = [event for event in WATCHED if event != Events.EXCEPTION_RAISED]
acts = st.builds(
    Act,
    st.sampled_from(EVENTS),
    st.integers(1, 7),
    # After an exception, this loop continues where the earlier one repeated: test_exceptions.
    st.sampled_from(sorted(ACTIONS.keys() - {"raise"})),
).filter(
    # An epoch cannot end before its first batch: see the test below.
    lambda act: not ("epoch" in act.action and act.event in {Events.STARTED, Events.EPOCH_STARTED})
)
limits = st.one_of(
    st.fixed_dictionaries({"max_epochs": st.integers(1, 4)}),
    st.fixed_dictionaries({"max_iters": st.integers(1, 9)}),
)


@st.composite
def plans(draw: st.DrawFn) -> tuple[str, list[Call]]:
    """Draw a loader and calls; epochs are a number of iterations in all of them, or in none."""
    loader = draw(st.sampled_from(sorted(LOADERS)))
    # The loop with flags gave a loader without a length the length of its first pass.
    counts = loader == "without length" or draw(st.booleans())
    length = {"epoch_length": draw(st.integers(1, 5))} if counts else {}
    calls = st.builds(Call, limits.map(lambda limit: {**limit, **length}), st.booleans())
    return loader, draw(st.lists(calls, min_size=1, max_size=4))


@settings(max_examples=400)
@given(plans(), st.lists(acts, max_size=3))
def test_random_stops_fire_the_events_that_the_loop_with_flags_fired(plan, acts):
    loader, calls = plan
    expected = Player(PreviousLoop, loader, acts).play(calls)

    assert Player(EventLoop, loader, acts).play(calls) == expected


@pytest.mark.parametrize("event", [Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED])
def test_an_epoch_without_iterations_has_no_safe_point_of_its_own(event):
    loop = EventLoop(lambda engine, batch: None)
    safe_points: list[int] = []
    loop.add_event_handler(event, lambda e: e.terminate_epoch() if e.state.epoch == 2 else None)
    loop.add_event_handler(
        RunEvents.SAFE_POINT(every=3), lambda e: safe_points.append(e.state.iteration)
    )
    loop.run([0, 1, 2], max_epochs=2)

    assert safe_points == [3]


@pytest.mark.parametrize("kind", [Engine, EventLoop])
@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_STARTED])
def test_an_epoch_cannot_be_ended_before_its_first_batch(kind, event):
    loop = kind(lambda engine, batch: None)
    loop.add_event_handler(event, lambda e: e.terminate_epoch())
    with pytest.raises(RuntimeError, match=r"terminate_epoch\(\)"):
        loop.run([0, 1, 2], max_epochs=2)


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
    assert loop.position == Position(1, 2, 0, Phase.BETWEEN_EPOCHS, completed=True)


@pytest.mark.parametrize(
    ("how", "outcome"),
    [
        (None, Outcome.COMPLETED),
        ("terminate", Outcome.TERMINATED),
        ("terminate, skip COMPLETED", Outcome.TERMINATED),
        ("interrupt", Outcome.INTERRUPTED),
        ("raise", Outcome.FAILED),
    ],
)
def test_the_end_of_a_run_is_announced_once_with_its_outcome(how, outcome):
    trainer = trainer_of()
    ends: list[Outcome | None] = []
    if how is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), ACTIONS[how])
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


ANNOUNCEMENTS = (RunEvents.RESTORE, RunEvents.ENDED, Events.EXCEPTION_RAISED)
"""Events that each call of `run` fires, and so one more after an exception."""


@attrs.define
class Stumbler(Player):
    """A player whose handlers and step raise at some times, whereupon it calls `run` again.

    A handler that raises does so before it has logged anything.

    Attributes:
        raises: an event, or "step", and at which of its times to raise.
    """

    raises: set[tuple[Any, int]] = attrs.field(factory=set)

    def made(self) -> Any:
        """Return a loop whose events are logged, apart from those of the calls themselves."""
        loop = self.kind(self.step)
        for event in WATCHED:
            if event not in ANNOUNCEMENTS:
                loop.add_event_handler(event, partial(self.log_first, event.name))
                loop.add_event_handler(event, partial(self.note, event))
        loop.add_event_handler(RunEvents.SAFE_POINT(every=2), lambda: self.log.append("every 2"))
        return loop

    def log_first(self, name: str, *_: object, **__: object) -> None:
        """Log an event; a handler of the same event raises behind this one."""
        self.log.append(f"first of {name}")

    def step(self, _: Any, batch: Any) -> None:
        """Log a step, if it does not raise."""
        self.stumble("step")
        self.counts["step"] += 1
        self.log.append(("step", batch))

    def note(self, event: Any, loop: Any, *arguments: object, **keywords: object) -> None:
        """Log an event and act, if it does not raise."""
        self.stumble(event)
        super().note(event, loop, *arguments, **keywords)

    def stumble(self, event: Any) -> None:
        """Raise once at this time of an event."""
        place = (event, self.counts[event] + 1)
        if place in self.raises:
            self.raises.remove(place)
            raise PlantedError

    def attempt(self, function: Callable[[], object]) -> None:
        """Call a function until it does not raise the planted error."""
        while True:
            try:
                function()
            except PlantedError:
                continue
            except (ResumeError, ValueError) as error:
                self.log.append(type(error).__name__)
            return


LATER = [event for event in EVENTS if event not in ANNOUNCEMENTS]
stops = acts.filter(lambda act: act.event in LATER and act.action != "raise")
stumbles = st.sets(st.tuples(st.sampled_from([*LATER, "step"]), st.integers(1, 7)), max_size=3)


@settings(max_examples=100)
@given(plans(), st.lists(stops, max_size=2), stumbles)
def test_random_exceptions_change_nothing_that_fires(plan, stops, stumbles):
    loader, calls = plan
    expected = Stumbler(EventLoop, loader, stops).play(calls)

    assert Stumbler(EventLoop, loader, stops, raises=stumbles).play(calls) == expected
