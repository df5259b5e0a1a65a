"""What TensorBoard reads from a run's folder."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import attrs
import pytest
from ignite.engine import Events

from diptych.engine import Trainer
from diptych.handlers import CheckpointManager, JsonLines, TensorBoard, Throughput, read_records
from tests.handlers.runs import Stop, loader, make_trainer, report_each_epoch, stop_at

Points = dict[str, list[tuple[int, float]]]


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def scalars(folder: Path) -> Points:
    events = read(folder)
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def in_json(folder: Path) -> Points:
    points: Points = {}
    for name in ("metrics.jsonl", "metrics.measured.jsonl"):
        for record in read_records(folder / name):
            for tag, value in record.values.items():
                points.setdefault(tag, []).append((record.step, float32(value)))
    return points


def test_every_sink_has_the_same_tags_steps_and_values(tmp_path):
    trainer = make_trainer()
    report_each_epoch(trainer, 0.1, 0.3)
    trainer.attach(Throughput(), TensorBoard(tmp_path), JsonLines(tmp_path))

    trainer.run(loader(), max_epochs=2)

    points = scalars(tmp_path)
    assert points == in_json(tmp_path)
    assert [step for step, _ in points["train/loss"]] == [4, 6, 8, 12]
    assert points["val/recall@1"] == [(6, float32(0.1)), (12, float32(0.3))]


def saving_trainer(folder: Path) -> Trainer:
    trainer = make_trainer()
    report_each_epoch(trainer, 0.1, 0.2, 0.3)
    return trainer.attach(TensorBoard(folder), CheckpointManager(folder / "checkpoints", every=5))


@pytest.mark.parametrize("stop", [3, 9, 14])
def test_no_point_is_double_after_an_interruption(tmp_path, stop):
    saving_trainer(tmp_path / "untouched").run(loader(), max_epochs=3)
    interrupted = saving_trainer(tmp_path / "interrupted")
    stop_at(interrupted, stop)
    with pytest.raises(Stop):
        interrupted.run(loader(), max_epochs=3)

    saving_trainer(tmp_path / "interrupted").run(loader(), max_epochs=3)

    assert scalars(tmp_path / "interrupted") == scalars(tmp_path / "untouched")


def test_settings_and_versions_are_shown_as_text(tmp_path):
    make_trainer().attach(TensorBoard(tmp_path)).run(loader(), max_epochs=1)

    (event,) = read(tmp_path).Tensors("settings/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    settings = json.loads(text.removeprefix("```json\n").removesuffix("\n```"))
    assert settings["trainer"]["seed"] == 5
    assert settings["versions"]["python"] == sys.version.split()[0]


@attrs.define(eq=False)
class Farewell:
    """A handler that shows something of its own when the run is over."""

    board: TensorBoard

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(Events.COMPLETED, self.say)

    def say(self) -> None:
        self.board.writer.add_text("farewell", "done")


def test_other_handlers_write_through_the_same_writer_until_the_end(tmp_path):
    board = TensorBoard(tmp_path)

    make_trainer().attach(board, Farewell(board)).run(loader(), max_epochs=1)

    assert "farewell/text_summary" in read(tmp_path).Tags()["tensors"]
    assert len(list(tmp_path.glob("events.*"))) == 1


def test_what_was_logged_before_an_exception_is_in_the_file(tmp_path):
    trainer = make_trainer().attach(TensorBoard(tmp_path))
    stop_at(trainer, 5)

    with pytest.raises(Stop):
        trainer.run(loader(), max_epochs=1)

    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [4]


def test_a_result_after_the_end_goes_into_a_further_file(tmp_path):
    trainer = make_trainer().attach(TensorBoard(tmp_path))
    trainer.run(loader(), max_epochs=1)

    trainer.metrics.report(6, {"test/recall@1": 0.5})

    assert scalars(tmp_path)["test/recall@1"] == [(6, 0.5)]
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [4, 6]


def test_rank_zero_alone_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.handlers.tensorboard.rank", lambda: 1)

    make_trainer().attach(TensorBoard(tmp_path / "run")).run(loader(), max_epochs=1)

    assert not (tmp_path / "run").exists()


def test_a_point_is_in_the_file_when_the_iteration_ends(tmp_path):
    seen: list[int] = []
    trainer = make_trainer().attach(TensorBoard(tmp_path))
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=5),
        lambda: seen.extend(s for s, _ in scalars(tmp_path)["train/loss"]),
    )

    trainer.run(loader(), max_epochs=1)

    assert seen == [4]


def test_writing_starts_no_thread(tmp_path):
    before = threading.active_count()
    running: list[int] = []
    trainer = make_trainer().attach(TensorBoard(tmp_path))
    trainer.add_event_handler(Events.COMPLETED, lambda: running.append(threading.active_count()))

    trainer.run(loader(), max_epochs=1)

    assert running == [before]


@pytest.mark.slow
def test_importing_the_handlers_does_not_import_tensorboard():
    code = "import sys, diptych.handlers; print('tensorboard' in sys.modules)"

    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )

    assert output.stdout.strip() == "False"
