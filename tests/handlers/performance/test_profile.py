"""The trace: its iterations, its file, and its format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych.engine import Trainer
from diptych.handlers import Profile
from tests.handlers.runs import Stop, loader, make_trainer, stop_at


def profiled(folder: Path, **options: object) -> Trainer:
    trainer = make_trainer().attach(Profile(folder, **options))
    trainer.run(loader(), max_epochs=2)
    return trainer


def updates(path: Path) -> int:
    """Return the number of updates in a trace."""
    events = json.loads(path.read_text("utf-8"))["traceEvents"]
    return sum(event.get("name", "").startswith("Optimizer.step#") for event in events)


@pytest.mark.parametrize(("skip", "steps"), [(1, 2), (3, 1), (4, 4)])
def test_a_trace_holds_the_requested_iterations(tmp_path, skip, steps):
    profiled(tmp_path / "profile", skip=skip, steps=steps)

    (path,) = (tmp_path / "profile").glob("*.json")
    assert path.name == f"rank0.{skip + steps}.pt.trace.json"
    assert updates(path) == steps


def test_a_table_lists_the_slowest_operators(tmp_path):
    profiled(tmp_path, skip=2, steps=2)

    text = (tmp_path / "rank0.4.operators.txt").read_text("utf-8")
    assert "aten::addmm" in text
    assert "Self CPU" in text


def test_a_run_that_ends_inside_the_window_writes_its_iterations(tmp_path):
    trainer = make_trainer().attach(Profile(tmp_path, skip=2, steps=99))
    stop_at(trainer, 5)

    with pytest.raises(Stop):
        trainer.run(loader(), max_epochs=2)

    assert updates(tmp_path / "rank0.5.pt.trace.json") == 3


def test_a_run_shorter_than_what_is_skipped_leaves_no_trace(tmp_path):
    profiled(tmp_path / "profile", skip=50)

    assert not (tmp_path / "profile").exists()


def test_a_continued_run_is_traced_from_its_first_iteration(tmp_path):
    trainer = make_trainer()
    trainer.run(loader(), max_epochs=1)
    trainer.attach(Profile(tmp_path, skip=2, steps=1))

    trainer.run(trainer.state.dataloader, max_epochs=2)

    assert [path.name for path in tmp_path.glob("*.json")] == ["rank0.9.pt.trace.json"]


@pytest.mark.parametrize("wrong", [{"skip": 0}, {"steps": 0}])
def test_an_empty_window_is_refused(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Profile(tmp_path, **wrong)
