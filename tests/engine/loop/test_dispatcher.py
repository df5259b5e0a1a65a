"""Events find their listeners, and each listener's time is its own."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import HandlersTimeProfiler

from diptych.engine.events import RunEvents, StepEvents
from diptych.engine.loop.dispatcher import Dispatcher
from diptych.engine.loop.event_loop import EventLoop
from tests.engine.models import paired, trainer_of


def engine_of(*events: Any) -> Dispatcher:
    engine = Dispatcher(lambda *_: None)
    engine.register_events(*StepEvents, *events)
    return engine


def costs(engine: Dispatcher) -> dict[str, tuple[int, float]]:
    return {listener.name: (listener.calls, listener.seconds) for listener in engine.listeners}


def test_a_listener_is_charged_for_itself_and_not_for_what_it_sets_off():
    engine = engine_of()

    def outer(engine: Engine) -> None:
        engine.fire_event(StepEvents.LOSS_COMPUTED)
        engine.fire_event(StepEvents.LOSS_COMPUTED)

    def inner() -> None:
        time.sleep(0.02)

    engine.add_event_handler(StepEvents.FORWARD_COMPLETED, outer)
    engine.add_event_handler(StepEvents.LOSS_COMPUTED, inner)
    engine.fire_event(StepEvents.FORWARD_COMPLETED)
    found = costs(engine)
    assert (found["outer"][0], found["inner"][0]) == (1, 2)
    assert found["inner"][1] >= 0.04
    assert found["outer"][1] < 0.02


def test_a_handler_that_is_added_while_its_event_fires_is_called_in_that_firing():
    engine, calls = engine_of(), []
    engine.add_event_handler(
        StepEvents.LOSS_COMPUTED,
        lambda e: e.add_event_handler(StepEvents.LOSS_COMPUTED, lambda: calls.append("late")),
    )
    engine.fire_event(StepEvents.LOSS_COMPUTED)
    assert calls == ["late"]


def test_a_handler_that_removes_itself_lets_the_others_of_its_event_run():
    engine, calls = engine_of(), []

    def once() -> None:
        calls.append("once")
        engine.remove_event_handler(once, StepEvents.LOSS_COMPUTED)

    engine.add_event_handler(StepEvents.LOSS_COMPUTED, once)
    engine.add_event_handler(StepEvents.LOSS_COMPUTED, lambda: calls.append("always"))
    for _ in range(2):
        engine.fire_event(StepEvents.LOSS_COMPUTED)
    assert calls == ["once", "always", "always"]


def test_an_event_is_found_by_its_name_whichever_object_names_it():
    engine, calls = engine_of("backward_completed"), []
    engine.add_event_handler("backward_completed", lambda: calls.append(1))
    for name in ("backward_completed", "completed"):
        engine.fire_event(name if name.startswith("backward") else f"backward_{name}")
    assert calls == [1, 1]


def test_an_event_that_nobody_registered_is_refused_each_time():
    engine = engine_of()
    for _ in range(2):
        with pytest.raises(ValueError, match="RESTORE"):
            engine.fire_event(RunEvents.RESTORE)


def test_arguments_of_ones_own_and_of_the_event_reach_the_handler_as_ignite_gives_them():
    given: dict[str, list[Any]] = {"ignite": [], "diptych": []}

    def fails(*_: Any) -> None:
        raise KeyError("lost")

    for name, engine in (("ignite", Engine(fails)), ("diptych", EventLoop(fails))):
        log = given[name]
        engine.add_event_handler(Events.STARTED, lambda *a, log=log, **k: log.append((a[1:], k)), 3)
        engine.add_event_handler(
            Events.EXCEPTION_RAISED, lambda _, error, log=log: log.append(str(error))
        )
        with contextlib.suppress(KeyError):  # which Ignite swallows
            engine.run([1])
    assert given["diptych"] == given["ignite"]


def test_what_a_profiler_of_ignites_puts_into_the_table_is_called():
    trainer, profiler = trainer_of(), HandlersTimeProfiler()

    def waits() -> None:
        time.sleep(0.01)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, waits)
    profiler.attach(trainer)
    trainer.run([paired(4)] * 3, max_epochs=1)
    (row,) = [row for row in profiler.get_results() if "waits" in row[0]]
    assert row[2] >= 0.03


def test_the_table_names_each_handler_its_event_its_cadence_and_its_calls():
    class Watcher:
        def attach(self, trainer: Any) -> None:
            trainer.every(2, self.look)
            trainer.add_event_handler(Events.ITERATION_STARTED(every=3), self.begin)
            trainer.add_event_handler(StepEvents.LOSS_COMPUTED, self.see)

        def look(self, _: Any) -> None:
            """See nothing."""

        begin = see = look

    trainer = trainer_of().attach(Watcher())
    trainer.run([paired(4)] * 6, max_epochs=1)
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:5]]
        for line in trainer.describe().splitlines()
        if "Watcher" in line
    ]
    assert sorted(row[1:] for row in rows) == [
        ["ITERATION_COMPLETED", "every=2", "3"],
        ["ITERATION_STARTED", "every=3", "6"],
        ["LOSS_COMPUTED", "", "6"],
    ]


def test_one_function_added_twice_keeps_the_arguments_of_each_time():
    engine, seen = engine_of(), []

    def note(_: Engine, *values: Any, name: str = "") -> None:
        seen.append((len(values), name))

    engine.add_event_handler(Events.STARTED, note, name="first")
    engine.add_event_handler(Events.STARTED, note, name="second")
    engine.add_event_handler(Events.STARTED, note, torch.zeros(2))
    engine.add_event_handler(Events.STARTED, note, torch.zeros(2), torch.ones(2))
    engine.fire_event(Events.STARTED)
    assert seen == [(0, "first"), (0, "second"), (1, ""), (2, "")]


@pytest.mark.parametrize("event", [Events.EPOCH_COMPLETED, Events.ITERATION_COMPLETED(every=3)])
def test_the_step_of_a_torch_scheduler_is_a_handler(event):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    loop = EventLoop(lambda *_: optimizer.step())
    loop.add_event_handler(event, scheduler.step)
    loop.run(range(3), max_epochs=2)

    assert optimizer.param_groups[0]["lr"] == 0.25
    assert loop.listeners[-1].owner is scheduler


class Halving:
    """A user's scheduler, as torch's interface has it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int | None = None) -> None:
        assert epoch is None
        self.optimizer.param_groups[0]["lr"] /= 2


def test_the_steps_of_optimizers_and_own_schedulers_are_handlers_too():
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loop = EventLoop(lambda *_: None)
    loop.add_event_handler(Events.ITERATION_COMPLETED, optimizer.step)
    loop.add_event_handler(Events.ITERATION_COMPLETED, Halving(optimizer).step)
    loop.every(3, scheduler.step)
    loop.run(range(3), max_epochs=1)

    assert weight.item() == 1 - 1 - 0.5 - 0.25
    assert optimizer.param_groups[0]["lr"] == 0.5**4


def test_a_step_that_needs_an_argument_is_refused_where_it_is_added():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    loop = EventLoop(lambda *_: None)
    for add in (loop.add_event_handler, lambda event, step: loop.every(2, step, event)):
        with pytest.raises(TypeError, match=r"pass metrics to ReduceLROnPlateau\.step"):
            add(Events.EPOCH_COMPLETED, scheduler.step)
    loop.add_event_handler(Events.EPOCH_COMPLETED, scheduler.step, 1.0)


def test_the_step_of_a_torch_scheduler_can_be_removed():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    loop = EventLoop(lambda *_: optimizer.step())
    loop.add_event_handler(Events.EPOCH_COMPLETED, scheduler.step)
    assert loop.has_event_handler(scheduler.step, Events.EPOCH_COMPLETED)
    loop.remove_event_handler(scheduler.step, Events.EPOCH_COMPLETED)
    loop.run(range(3), max_epochs=1)

    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("kind", [Engine, EventLoop])
def test_handlers_that_edit_the_table_while_their_event_fires_take_effect_in_that_firing(kind):
    engine, calls = kind(lambda *_: None), []
    table = engine._event_handlers

    def note(name: str) -> tuple[Any, ...]:
        return (lambda: calls.append(name), (), {})

    def edit() -> None:
        entries = table[Events.STARTED]
        entries[2] = note("in the place of another")
        entries.append(note("appended"))
        table[Events.EPOCH_STARTED].insert(0, note("of another event"))

    engine.add_event_handler(Events.STARTED, edit)
    engine.add_event_handler(Events.STARTED, lambda: calls.append("kept"))
    engine.add_event_handler(Events.STARTED, lambda: calls.append("replaced"))
    engine.add_event_handler(Events.COMPLETED, table[Events.EPOCH_STARTED].clear)
    engine.run([1], max_epochs=1)
    engine.state.max_epochs = None
    del table[Events.STARTED][0]
    engine.run([1], max_epochs=1)

    kept = ["kept", "in the place of another", "appended"]
    assert calls == [*kept, "of another event", *kept]


def test_a_handler_of_an_engine_that_is_gone_is_an_error():
    for engine in (Engine(lambda *_: None), EventLoop(lambda *_: None)):
        gone = Engine(lambda *_: None)
        reference = weakref.ref(gone)
        del gone
        gc.collect()
        engine._event_handlers[Events.STARTED].append((lambda _: None, (reference,), {}))
        with pytest.raises(RuntimeError, match="Engine reference not resolved"):
            engine.run([1], max_epochs=1)


def test_handlers_that_could_not_be_attached_together_are_removed_and_later_ones_are_called():
    engine, calls = engine_of(), []
    engine.add_event_handler(Events.STARTED, lambda: calls.append("before"))
    with contextlib.suppress(KeyError), engine.all_or_nothing():
        engine.add_event_handler(Events.STARTED, lambda: calls.append("never"))
        raise KeyError
    engine.add_event_handler(Events.STARTED, lambda: calls.append("after"))
    engine.fire_event(Events.STARTED)

    assert calls == ["before", "after"]
