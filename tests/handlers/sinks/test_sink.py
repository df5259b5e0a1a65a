"""The promises of every sink: rank 0 alone writes, and it is closed however a run ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from ignite.engine import Events

from diptych import handlers
from diptych.engine import Trainer
from diptych.handlers import JsonLines, Sink, TensorBoard, ToLogger, read_records
from diptych.handlers.sinks.trackers import Tracker
from tests.handlers.runs import Stop, loader, make_trainer, report_each_epoch


class Log:
    """A logger that opens a file when it is first used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_open = False

    def write(self, values: Mapping[str, float], step: int) -> None:
        self.is_open = True
        with self.path.open("a") as file:
            file.writelines(f"{step} {tag}\n" for tag in values)

    def close(self) -> None:
        self.is_open = False


@attrs.define(eq=False)
class Service(Tracker):
    """A tracker whose service is a log."""

    package = "torch"
    log: Log = attrs.field(kw_only=True)

    def _open(self, run: str) -> tuple[Any, str]:
        return self.log, run or "new"

    def _describe(self, *_: object) -> None:
        self.log.write({}, 0)

    def _send(self, values: Mapping[str, float], step: int) -> None:
        self.log.write(values, step)

    def _close_run(self, *, failed: bool) -> None:
        self.log.close()


@attrs.frozen
class Example:
    """A sink, whether it holds something open, and the (step, tag) pairs that it has written."""

    sink: Sink
    is_open: Callable[[], bool]
    written: Callable[[], set[tuple[int, str]]]


def of_log(sink: Sink, log: Log) -> Example:
    def written() -> set[tuple[int, str]]:
        lines = log.path.read_text().splitlines() if log.path.exists() else []
        return {(int(line.split()[0]), line.split()[1]) for line in lines}

    return Example(sink, lambda: log.is_open, written)


def of_function(folder: Path) -> Example:
    log = Log(folder / "log")
    return of_log(ToLogger(log.write, close=log.close), log)


def of_service(folder: Path) -> Example:
    log = Log(folder / "log")
    return of_log(Service("pairs", log=log), log)


def of_json(folder: Path) -> Example:
    sink = JsonLines(folder)

    def written() -> set[tuple[int, str]]:
        records = read_records(sink.path) if sink.path.exists() else []
        return {(record.step, tag) for record in records for tag in record.values}

    return Example(sink, lambda: any(one.file.is_open for one in sink._files.values()), written)


def of_tensorboard(folder: Path) -> Example:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def written() -> set[tuple[int, str]]:
        events = EventAccumulator(str(folder)).Reload()
        points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        points["train/loss"] = points.pop("fit/loss", [])
        return {(event.step, tag) for tag, own in points.items() for event in own}

    sink = TensorBoard(folder)
    return Example(sink, lambda: sink._writer is not None, written)


EXAMPLES: dict[str, Callable[[Path], Example]] = {
    "JsonLines": of_json,
    "TensorBoard": of_tensorboard,
    "ToLogger": of_function,
    "Tracker": of_service,
}

every_sink = pytest.mark.parametrize("kind", EXAMPLES)


def go_on(_: Trainer) -> None:
    """Let the run complete."""


def fail(_: Trainer) -> None:
    raise Stop


ENDS: dict[str, Callable[[Trainer], object]] = {
    "terminated": lambda trainer: trainer.terminate(),
    "terminated without COMPLETED": lambda trainer: trainer.terminate(skip_completed=True),
    "failed": fail,
}


def run(example: Example, end: Callable[[Trainer], object] = go_on) -> Trainer:
    """Run two epochs, or until the fifth iteration if a function ends the run there."""
    trainer = make_trainer().attach(example.sink)
    report_each_epoch(trainer, 0.25, 0.75)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), end)
    try:
        trainer.run(loader(), max_epochs=2)
    except Stop:
        assert end is fail
    return trainer


def test_every_exported_sink_is_an_example():
    exported = [getattr(handlers, name) for name in handlers.__all__]
    sinks = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, Sink)}
    own = {kind.__name__ for kind in sinks - {Sink} if not issubclass(kind, Tracker)}
    assert own == {*EXAMPLES} - {"Tracker"}


@every_sink
def test_a_completed_run_leaves_it_closed_with_every_record(kind, tmp_path):
    example = EXAMPLES[kind](tmp_path)

    run(example)

    assert not example.is_open()
    losses = {(step, "train/loss") for step in (4, 6, 8, 12)}
    assert example.written() == losses | {(6, "val/recall@1"), (12, "val/recall@1")}


@every_sink
@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_ends_early_leaves_it_closed(kind, end, tmp_path):
    example = EXAMPLES[kind](tmp_path)

    run(example, ENDS[end])

    assert not example.is_open()
    assert example.written() == {(4, "train/loss")}


@every_sink
def test_an_interrupted_run_leaves_everything_written_and_its_continuation_closes_it(
    kind, tmp_path
):
    example = EXAMPLES[kind](tmp_path)

    trainer = run(example, lambda trainer: trainer.interrupt())

    assert example.is_open()
    assert example.written() == {(4, "train/loss")}

    trainer.run(trainer.state.dataloader, max_epochs=2)

    assert not example.is_open()
    assert {step for step, _ in example.written()} == {4, 6, 8, 12}


@every_sink
def test_a_record_after_the_end_is_written_and_leaves_it_closed(kind, tmp_path):
    example = EXAMPLES[kind](tmp_path)
    trainer = run(example)

    trainer.metrics.report(12, {"test/recall@1": 0.5})

    assert (12, "test/recall@1") in example.written()
    assert not example.is_open()


@every_sink
def test_a_second_run_writes_again(kind, tmp_path):
    example = EXAMPLES[kind](tmp_path)
    trainer = run(example)
    report_each_epoch(trainer, 0.0, 0.0, 1.0, tag="test/recall@1")

    trainer.state.max_epochs = None
    trainer.run(loader(), max_epochs=2)

    assert (12, "test/recall@1") in example.written()
    assert not example.is_open()


@every_sink
def test_other_ranks_write_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.handlers.output.output_handler.rank", lambda: 1)
    example = EXAMPLES[kind](tmp_path / "none")

    run(example)

    assert not (tmp_path / "none").exists()
