"""Log lines about a run's length when it starts."""

from __future__ import annotations

import itertools
import logging

import pytest
from ignite.engine import Events
from ignite.metrics import Average
from torch.utils.data import DataLoader, IterableDataset

from diptych.engine import MetricsEvents, RunEvents
from tests.engine.loop.loops import Tape, Unsized


class Numbers(IterableDataset):
    """Endless."""

    def __iter__(self):
        return itertools.count()


@pytest.fixture
def warnings(caplog):
    """Return a function that gives the warnings so far."""
    caplog.set_level(logging.INFO)

    def of(level: int = logging.WARNING) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == level]

    return of


def evaluate_each_epoch() -> None:
    """Wait for the end of an epoch."""


@pytest.mark.parametrize("data", [DataLoader(Numbers()), itertools.count(), Unsized(range(9))])
def test_handlers_that_wait_for_an_epoch_without_a_length_are_named_once(data, warnings):
    loop = Tape()
    loop.add_event_handler(Events.EPOCH_COMPLETED, evaluate_each_epoch)
    Average().attach(loop, "mean")
    loop.run(data, max_iters=4)

    (text,) = warnings()
    assert "evaluate_each_epoch" in text
    assert "Average.completed" in text
    assert "Pass epoch_length= to run, or every=<iterations>" in text


@pytest.mark.parametrize(
    ("data", "limits"),
    [
        (itertools.count(), {"max_iters": 4, "epoch_length": 2}),
        (range(2), {"max_iters": 4}),
        (Unsized(range(2)), {"max_epochs": 2}),
    ],
)
def test_a_run_whose_epochs_end_names_none(data, limits, warnings):
    loop = Tape()
    loop.add_event_handler(Events.EPOCH_COMPLETED, evaluate_each_epoch)
    loop.run(data, **limits)

    assert warnings() == []


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, RunEvents.SAFE_POINT])
def test_handlers_of_iterations_do_not_wait_for_an_epoch(event, warnings):
    loop = Tape()
    loop.add_event_handler(event(every=2), evaluate_each_epoch)
    loop.run(itertools.count(), max_iters=4)

    assert warnings() == []


def test_what_waits_for_the_published_values_of_an_epoch_is_named(warnings):
    loop = Tape()
    loop.add_event_handler(MetricsEvents.EPOCH_PUBLISHED, evaluate_each_epoch)
    loop.run(itertools.count(), max_iters=4)

    assert "evaluate_each_epoch" in warnings()[0]


def test_a_run_without_a_limit_logs_that_it_does_one_epoch(warnings):
    loop = Tape()
    loop.run(range(2))
    (text,) = warnings(logging.INFO)
    assert text.startswith("The run does one epoch")
    loop.run(range(2), max_epochs=2)

    assert len(warnings(logging.INFO)) == 1


def test_a_handler_that_sets_the_length_of_the_run_is_no_surprise(warnings):
    loop = Tape()
    loop.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "max_epochs", 3))
    loop.run(range(2))

    assert loop.state.epoch == 3
    assert warnings(logging.INFO) == []
