"""Each row of the page on differences from a stock engine is a script that runs on both.

Where a script raises, its value is the name of the error's class.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from ignite.engine import Engine, EventEnum, Events
from ignite.handlers import EarlyStopping
from torch import nn

from diptych.engine import RunEvents, StepEvents, Trainer, tasks
from tests.engine.loop.loops import EpochAware, Unsized, events_of

PAGE = Path(__file__).parents[3] / "docs" / "guide" / "ignite.md"
ROW = re.compile(r"^\| `([a-z-]+)` \|", re.MULTILINE)


def stock_engine(step: Callable[[Any, Any], Any] = lambda *_: None) -> Engine:
    """Return a stock engine."""
    return Engine(step)


def trainer(step: Callable[[Any, Any], Any] = lambda *_: None) -> Trainer:
    """Return a trainer with a model, a loss and an optimizer that do nothing."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return Trainer(
        model, nn.MSELoss(), optimizer, task=tasks.classification, device="cpu", step=step
    )


Make = Callable[..., Any]


@attrs.frozen
class Difference:
    """A script, and what it returns on a stock engine and on a trainer."""

    script: Callable[[Make], object]
    stock: object
    ours: object


DIFFERENCES: dict[str, Difference] = {}


def difference(key: str, *, stock: object, ours: object) -> Callable[[Any], Any]:
    """Return a decorator that adds a script to the rows of the page."""

    def add(script: Callable[[Make], object]) -> Callable[[Make], object]:
        DIFFERENCES[key] = Difference(script, stock, ours)
        return script

    return add


def value_of(script: Callable[[Make], object], make: Make) -> object:
    """Return the value of a script, or the name of the class of its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ignite's about iterators that have ended
        try:
            return script(make)
        except Exception as error:  # noqa: BLE001 - any error is a value
            return type(error).__name__


def taken(make: Make) -> tuple[Any, list[Any]]:
    """Return an engine, and the list of the batches that its step takes."""
    batches: list[Any] = []
    return make(lambda _, batch: batches.append(batch)), batches


def once(engine: Any, event: Any, action: Callable[[], object], at: int = 2) -> None:
    """Call a function when an event fires for the first time in an iteration."""
    called: list[int] = []

    def call(engine: Any) -> None:
        if engine.state.iteration == at and not called:
            called.append(at)
            action()

    engine.add_event_handler(event, call)


@difference("finished-run", stock=[1, 2, 1, 2], ours=[1, 2])
def train_twice(make: Make) -> object:
    engine, batches = taken(make)
    for _ in range(2):
        engine.run([1, 2], max_epochs=1)
    return batches


@difference("smaller-limit", stock="ValueError", ours=2)
def lower_max_epochs(make: Make) -> object:
    engine = make()
    engine.run([1, 2], max_epochs=2)
    return engine.run([1, 2], max_epochs=1).epoch


@difference("change-of-limit", stock="ValueError", ours=3)
def limit_iterations_after_epochs(make: Make) -> object:
    engine = make()
    engine.run([1, 2], max_epochs=1)
    return engine.run([1, 2], max_iters=3).iteration


@difference("new-epoch-length", stock="ValueError", ours=[1, 2, 1, 2, 1])
def change_epoch_length(make: Make) -> object:
    engine, batches = taken(make)
    engine.run([1, 2], max_epochs=1)
    engine.run([1, 2], max_epochs=2, epoch_length=3)
    return batches


@difference("limit-from-iterations", stock=(2, 3), ours=(None, 3))
def derive_max_epochs(make: Make) -> object:
    engine = make()
    engine.run(Unsized([1, 2]), max_iters=3)
    return engine.state.max_epochs, engine.state.max_iters


@difference("rest-of-epoch", stock=[1, 2, 1, 2, 3], ours=[1, 2, 3, 1, 2, 3])
def terminate_and_run_again(make: Make) -> object:
    engine, batches = taken(make)
    once(engine, Events.ITERATION_COMPLETED, engine.terminate)
    data = [1, 2, 3]
    for _ in range(2):
        engine.run(data, max_epochs=2)
    return batches


@difference("stopped-early", stock=3, ours=2)
def stop_early_and_run_again(make: Make) -> object:
    engine = make()
    stopping = EarlyStopping(patience=1, score_function=lambda _: 0.0, trainer=engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, stopping)
    for _ in range(2):
        engine.run([1], max_epochs=4)
    return engine.state.epoch


@difference("another-loader", stock=[1, 2, 4, 5, 6], ours="ResumeError")
def change_loader_inside_an_epoch(make: Make) -> object:
    engine, batches = taken(make)
    once(engine, Events.ITERATION_COMPLETED, engine.terminate)
    engine.run([1, 2, 3], max_epochs=2)
    engine.run([4, 5, 6], max_epochs=2)
    return batches


@difference(
    "resumed-epoch",
    stock=([1, 2, 1, 2, 3, 1], ["EPOCH_STARTED", "EPOCH_STARTED"]),
    ours=([1, 2, 3, 1, 2, 3], ["EPOCH_STARTED"]),
)
def resume_inside_an_epoch(make: Make) -> object:
    first, batches = taken(make)
    once(first, Events.ITERATION_COMPLETED, first.terminate)
    first.run([1, 2, 3], max_epochs=2)
    second = make(lambda _, batch: batches.append(batch))
    fired = events_of(second, Events.EPOCH_STARTED)
    second.load_state_dict(first.state_dict())
    second.run([1, 2, 3])
    return batches, fired


@difference("state-dict", stock=3, ours="ValueError")
def load_into_a_stock_engine(make: Make) -> object:
    engine, other = make(), stock_engine()
    engine.run([1, 2, 3], max_epochs=1)
    other.load_state_dict(engine.state_dict())
    return other.state.iteration


@difference("process-function", stock="ValueError", ours="TrainStep")
def leave_the_process_function_out(make: Make) -> object:
    return type(make(None)._process_function).__name__


@difference("stop-in-iteration", stock=([1], 2), ours=([1, 2], 2))
def terminate_before_the_step(make: Make) -> object:
    engine, batches = taken(make)
    once(engine, Events.ITERATION_STARTED, engine.terminate)
    engine.run([1, 2, 3], max_epochs=1)
    return batches, engine.state.iteration


@difference("epoch-stop-in-iteration", stock=([1, 1, 2, 3], 5), ours=([1, 2, 1, 2, 3], 5))
def end_the_epoch_before_the_step(make: Make) -> object:
    engine, batches = taken(make)
    once(engine, Events.ITERATION_STARTED, engine.terminate_epoch)
    engine.run([1, 2, 3], max_epochs=2)
    return batches, engine.state.iteration


@difference("engine-as-flag", stock=[], ours=["COMPLETED"])
def terminate_as_a_handler(make: Make) -> object:
    engine = make()
    fired = events_of(engine, Events.COMPLETED)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate)
    engine.run([1, 2, 3], max_epochs=1)
    return fired


@difference("limit-in-epoch", stock=["TERMINATE", "COMPLETED"], ours=["EPOCH_CUT", "COMPLETED"])
def reach_max_iters_inside_an_epoch(make: Make) -> object:
    engine = make()
    ends = [Events.EPOCH_COMPLETED, Events.TERMINATE, Events.COMPLETED]
    if isinstance(engine, Trainer):
        ends.append(RunEvents.EPOCH_CUT)
    fired = events_of(engine, *ends)
    engine.run([1, 2, 3], max_iters=2)
    return fired


@difference("exhausted-iterator", stock=([1, 2], 4, 4), ours=([1, 2], 1, "ResumeError"))
def run_epochs_over_an_iterator(make: Make) -> object:
    engine, batches = taken(make)
    ended = events_of(engine, Events.EPOCH_COMPLETED)
    result: object = "ResumeError"
    with contextlib.suppress(ValueError):
        result = engine.run(iter([1, 2]), max_epochs=4).epoch
    return batches, len(ended), result


class PlantedError(Exception):
    """Raised by a step."""


def failing_once(make: Make) -> tuple[Any, list[Any]]:
    """Return an engine whose second step fails once, and the batches of the others."""
    batches: list[Any] = []
    failures = [PlantedError()]

    def step(_: Any, batch: Any) -> None:
        if batch == 2 and failures:
            raise failures.pop()
        batches.append(batch)

    return make(step), batches


@difference("swallowed-exception", stock="returned", ours="PlantedError")
def handle_an_exception(make: Make) -> object:
    engine, _ = failing_once(make)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda *_: None)
    engine.run([1, 2, 3], max_epochs=1)
    return "returned"


@difference("run-after-exception", stock=[1], ours=[1, 2, 3])
def run_after_an_exception(make: Make) -> object:
    engine, batches = failing_once(make)
    data = [1, 2, 3]
    for _ in range(2):
        with contextlib.suppress(PlantedError):
            engine.run(data, max_epochs=1)
    return batches


@difference("iteration-that-failed", stock=2, ours=1)
def count_a_failed_iteration(make: Make) -> object:
    engine, _ = failing_once(make)
    with contextlib.suppress(PlantedError):
        engine.run([1, 2, 3], max_epochs=1)
    return engine.state.iteration


class Growing:
    """Gives one batch more in each pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(range(self.passes))


@difference("length-of-epoch", stock=[1, 1, 1], ours=[1, 2, 3])
def vary_the_length_of_epochs(make: Make) -> object:
    engine, lengths = make(), [0, 0, 0]
    engine.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: lengths.__setitem__(e.state.epoch - 1, lengths[e.state.epoch - 1] + 1),
    )
    engine.run(Growing(), max_epochs=3)
    return lengths


@difference("epoch-of-loader", stock=[], ours=[0, 1])
def tell_the_loader_its_epoch(make: Make) -> object:
    loader = EpochAware([1, 2])
    make().run(loader, max_epochs=2)
    return loader.told


@difference("own-events", stock="ValueError", ours="attached")
def listen_to_the_phases_of_a_step(make: Make) -> object:
    make().add_event_handler(StepEvents.OPTIMIZER_STEPPED, lambda: None)
    return "attached"


class Own(EventEnum):
    """Events of a user's own."""

    WITHOUT_COUNTER = "without_counter"  # Ignite keeps counters by name, for all engines


@difference("own-handlers", stock=0, ours=True)
def count_handlers_of_nobody(make: Make) -> object:
    return len(make()._event_handlers[Events.STARTED]) > 0


@difference("event-filters", stock="RuntimeError", ours=[2, 4])
def filter_an_event_of_the_library(make: Make) -> object:
    event = StepEvents.LOSS_COMPUTED if make is trainer else Own.WITHOUT_COUNTER
    engine = make(lambda engine, _: engine.fire_event(event))
    if make is stock_engine:
        engine.register_events(*Own)
    seen: list[int] = []
    engine.add_event_handler(event(every=2), lambda: seen.append(engine.state.iteration))
    engine.run([1, 2, 3, 4], max_epochs=1)
    return seen


@difference("scheduler-step", stock="TypeError", ours=0.25)
def step_a_scheduler_as_a_handler(make: Make) -> object:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    engine = make(lambda *_: optimizer.step())
    engine.add_event_handler(Events.EPOCH_COMPLETED, scheduler.step)
    engine.run([1], max_epochs=2)
    return optimizer.param_groups[0]["lr"]


@difference("output-between-steps", stock=[None, None, None], ours=[None, 1, 2])
def read_the_output_before_the_step(make: Make) -> object:
    engine, outputs = make(lambda _, batch: batch), []
    engine.add_event_handler(
        Events.GET_BATCH_COMPLETED, lambda: outputs.append(engine.state.output)
    )
    engine.run([1, 2, 3], max_epochs=1)
    return outputs


def test_each_row_of_the_page_has_a_script_and_each_script_a_row():
    assert ROW.findall(PAGE.read_text(encoding="utf-8")) == list(DIFFERENCES)


@pytest.mark.parametrize("key", DIFFERENCES)
def test_a_row_is_true_of_a_stock_engine_and_of_a_trainer(key):
    row = DIFFERENCES[key]

    assert value_of(row.script, stock_engine) == row.stock
    assert value_of(row.script, trainer) == row.ours
