"""Handlers that write: their errors are logged once and counted, and never end a run."""

from __future__ import annotations

import errno
import io
import itertools
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from ignite.engine import Events

from diptych.engine import (
    BatchError,
    CheckpointError,
    MetricsEvents,
    ResumeError,
    RunEvents,
    Trainer,
)
from diptych.engine.errors import LostRankError
from diptych.engine.metrics.metrics_collector import Record
from diptych.handlers import RunCard, Sink, ToLogger
from diptych.handlers.output import output_handler
from diptych.handlers.output.output_handler import OutputHandler
from diptych.handlers.sinks import sink as sink_module
from tests.handlers.runs import Stop, loader, make_trainer, report_each_epoch

FULL = OSError(errno.ENOSPC, "No space left on device")
STEPS = [*range(1, 7), 6, *range(7, 13), 12]  # log points, and a result at the end of each epoch


class Destination:
    """A service that is out of reach for some calls, counted from 1."""

    def __init__(self, fails: Callable[[int], bool], error: Exception = FULL) -> None:
        self.fails, self.error = fails, error
        self.calls, self.steps = 0, list[int]()

    def reach(self) -> None:
        self.calls += 1
        if self.fails(self.calls):
            raise self.error


class Plain(Sink):
    """A user's sink: an ordinary class, whose `__init__` calls no other."""

    def __init__(self, destination: Destination) -> None:
        self.place = destination

    def write_record(self, trainer: Trainer, record: Record) -> None:
        self.place.reach()
        self.place.steps.append(record.step)

    def close_destination(self, trainer: Trainer) -> None:
        self.place.reach()


@attrs.define(eq=False)
class Listening(Sink):
    """A user's sink with events of its own, which opens its destination when a run starts."""

    place: Destination
    is_open: bool = attrs.field(default=False, init=False)

    def listen(self, trainer: Trainer) -> None:
        super().listen(trainer)
        trainer.add_event_handler(Events.STARTED, self.open)
        trainer.add_event_handler(Events.EPOCH_COMPLETED(every=1), self.flush)
        trainer.every(2, self.flush)

    def open(self) -> None:
        self.place.reach()
        self.is_open = True

    def flush(self, _: Any) -> None:
        self.place.reach()

    def write_record(self, trainer: Trainer, record: Record) -> None:
        if not self.is_open:
            self.open()
        self.place.reach()
        self.place.steps.append(record.step)

    def close_destination(self, trainer: Trainer) -> None:
        self.is_open = False
        self.place.reach()


KINDS = {"plain": Plain, "listening": Listening}
every_kind = pytest.mark.parametrize("kind", KINDS)
ERRORS = [FULL, RuntimeError("the service is gone"), ValueError("I/O operation on closed file")]


@pytest.fixture(autouse=True)
def _busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no attempt count as slow on a busy machine."""
    monkeypatch.setattr(output_handler, "SLOW", 0.5)


def run(*handlers: Any, epochs: int = 2) -> Trainer:
    trainer = make_trainer(log_every=1)
    report_each_epoch(trainer, 0.25, 0.75, 0.5)
    trainer.attach(*handlers)
    trainer.run(loader(), max_epochs=epochs)
    assert trainer.state.iteration == 6 * epochs
    return trainer


@every_kind
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("first", [2, 5, 9])
def test_a_destination_that_fails_for_a_while_gets_every_record_in_order(
    kind, error, first, caplog
):
    place = Destination(lambda call: first <= call < first + 6, error)

    run(sink := KINDS[kind](place))

    # Unless the system reports an error, a record may be at fault, and the next one is tried.
    assert (place.steps if error is FULL else sorted(place.steps)) == STEPS
    assert sink.unwritten == {}
    assert caplog.text.count("could not write its output: ") == 1
    assert caplog.text.count("writes its output again") == 1


@every_kind
def test_a_destination_that_never_works_is_counted_and_logged_once(kind, caplog):
    place = Destination(lambda call: call > 1)

    run(sink := KINDS[kind](place))

    assert place.steps == ([1] if kind == "plain" else [])
    assert sink.unwritten == {"its output": len(STEPS) - len(place.steps)}
    (line,) = [r.message for r in caplog.records if "could not write its output:" in r.message]
    assert line == (
        f"{type(sink).__name__} could not write its output: [Errno 28] No space left on device. "
        "The run continues, and writing is tried again."
    )


@every_kind
def test_a_dry_run_copies_a_sink_of_the_users(kind):
    place = Destination(lambda _: False)
    trainer = make_trainer(log_every=1).attach(KINDS[kind](place))

    trainer.dry_run(loader())

    assert trainer.state.iteration == 0
    assert place.calls, "the copy has not written"


def test_what_was_pending_is_written_when_the_run_goes_on(caplog):
    place = Destination(lambda call: 3 < call < 100)
    trainer = run(sink := Plain(place))
    assert place.steps == [1, 2, 3]

    place.fails = lambda _: False
    trainer.run(loader(), max_epochs=3)

    assert place.steps == [*STEPS, *range(13, 19), 18]
    assert sink.unwritten == {}


def test_a_record_that_the_destination_refuses_for_ever_costs_itself_alone():
    seen: list[int] = []

    def write(_: Any, step: int) -> None:
        if step == 4:
            raise ValueError("4 is not a number")
        seen.append(step)

    run(sink := ToLogger(write))

    assert seen == [step for step in STEPS if step != 4]
    assert sink.unwritten == {"its output": 1}


def test_the_memory_for_records_is_bounded_and_keeps_the_first_and_the_last(monkeypatch):
    monkeypatch.setattr(sink_module, "MOST_PENDING", 4)
    place = Destination(lambda call: call < 20)
    trainer = run(sink := Plain(place))
    assert sink.unwritten == {"its output": len(STEPS)}

    place.fails = lambda _: False
    trainer.metrics.report(12, {"test/loss": 0.5})

    assert place.steps[:2] == [1, 2]
    assert place.steps[-1] == 12
    assert len(place.steps) <= 5
    assert sink.unwritten == {"its output": len(STEPS) + 1 - len(place.steps)}


def test_a_slow_failure_is_not_repeated_at_every_record(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

        def pass_(self) -> None:
            self.now += 5

    clock, attempts = Clock(), list[float]()
    monkeypatch.setattr(output_handler, "time", clock)

    def write(_: Any, __: int) -> None:
        attempts.append(clock.now)
        clock.now += 1.0  # a time-out
        raise TimeoutError("no answer")

    trainer = make_trainer(log_every=1).attach(ToLogger(write))
    trainer.add_event_handler(Events.ITERATION_STARTED, clock.pass_)
    trainer.run(loader(), max_epochs=2)

    pauses = [b - a for a, b in itertools.pairwise(attempts)]
    assert min(pauses[:-1]) > 20
    assert len(attempts) == 4  # three in a minute, and one more at the end of the run


@pytest.mark.parametrize("error", [BatchError, CheckpointError, LostRankError, ResumeError])
def test_errors_of_the_run_itself_reach_the_caller(error):
    with pytest.raises(error, match="of the run"):
        run(Plain(Destination(lambda call: call == 2, error("of the run"))))


def test_an_end_of_the_process_passes():
    def write(_: Any, __: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        run(ToLogger(write))


@pytest.mark.parametrize("error", [ValueError, TypeError, NotADirectoryError, FileExistsError])
def test_a_mistake_that_shows_at_the_start_reaches_the_caller(error):
    with pytest.raises(error, match="mistaken"):
        run(Listening(Destination(lambda call: call == 1, error("mistaken"))))


def test_the_card_at_the_end_says_what_is_missing():
    stream, place = io.StringIO(), Destination(lambda call: call > 3)

    run(Plain(place), RunCard(stream=stream))

    assert "missing 11 writes to its output ([Errno 28] No space left on device)\n" in (
        stream.getvalue()
    )
    healthy = io.StringIO()
    run(Plain(Destination(lambda _: False)), RunCard(stream=healthy))
    assert "missing" not in healthy.getvalue()


class Wallpaper(OutputHandler):
    """A handler that writes on an event, and is no sink."""

    def listen(self, trainer: Trainer) -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), self.draw)

    def draw(self, trainer: Trainer) -> None:
        if trainer.state.iteration in {3, 6}:
            raise FULL


def test_a_method_that_listens_is_guarded_and_named_in_the_table_of_listeners(caplog):
    trainer = run(Wallpaper())

    assert "Wallpaper could not write its output (in Wallpaper.draw): [Errno 28]" in caplog.text
    assert len([r for r in caplog.records if "Wallpaper" in r.message]) == 1
    assert "| `Wallpaper.draw` | `ITERATION_COMPLETED` | every=3 | 12 |" in trainer.describe()


@pytest.mark.parametrize("kind", KINDS)
def test_profilers_and_removed_handlers_leave_the_guard_in_place(kind, caplog):
    from ignite.handlers.time_profilers import HandlersTimeProfiler

    place = Destination(lambda call: call > 2)
    trainer = make_trainer(log_every=1).attach(KINDS[kind](place))
    HandlersTimeProfiler().attach(trainer)
    for event in (MetricsEvents.LOGGED, RunEvents.ENDED, Events.STARTED):
        trainer.add_event_handler(event, print_nothing)
        trainer.remove_event_handler(print_nothing, event)

    trainer.run(loader(), max_epochs=2)

    assert trainer.state.iteration == 12
    assert "could not write its output" in caplog.text


def print_nothing() -> None:
    """Be a handler that is removed before the run starts."""
    raise AssertionError


def test_a_guarded_function_can_be_removed():
    trainer = make_trainer().attach(handler := Wallpaper())
    assert trainer.has_event_handler(handler.draw, Events.ITERATION_COMPLETED)
    trainer.remove_event_handler(handler.draw, Events.ITERATION_COMPLETED)

    assert "Wallpaper" not in trainer.describe()
