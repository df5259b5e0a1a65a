"""The content of a run directory, as TensorBoard reads it."""

from __future__ import annotations

import json
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import attrs
import pytest
from ignite.engine import Events

from diptych.engine import Trainer
from diptych.handlers import (
    CheckpointManager,
    Evaluation,
    Finding,
    Histograms,
    JsonLines,
    RepresentationHealth,
    TensorBoard,
    Throughput,
    read_records,
)
from tests.handlers.runs import Stop, loader, make_trainer, report_each_epoch, stop_at
from tests.losses.processes import printed

Points = dict[str, list[tuple[int, float]]]


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def scalars(folder: Path) -> Points:
    """Return the points by the records' tags: evaluations are the runs in folders."""
    points: Points = {}
    for place in sorted({path.parent for path in folder.rglob("events.out.*")}):
        events, run = read(place), place.relative_to(folder).as_posix()
        for tag in events.Tags()["scalars"]:
            prefix = "train/" if run == "." else f"{run}/"
            whole = tag.replace("fit/", prefix) if tag.startswith("fit/") else tag
            points[whole] = [(e.step, e.value) for e in events.Scalars(tag)]
    return points


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def in_json(folder: Path) -> Points:
    points: Points = {}
    for path in folder.glob("metrics*.jsonl"):
        for record in read_records(path):
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


def evaluated_trainer(folder: Path) -> Trainer:
    trainer = make_trainer()
    trainer.attach(
        Evaluation(loader(), every=2, at_start=True),
        Evaluation(loader(), every=6, prefix="test/a", loss=True),
        Evaluation(loader(), prefix="../outside"),
        TensorBoard(folder),
        JsonLines(folder),
    )
    return trainer.attach(CheckpointManager(folder / "checkpoints", every=5))


def test_an_evaluation_is_a_run_of_its_own_that_shares_the_chart_of_the_training_loss(tmp_path):
    trainer = evaluated_trainer(tmp_path / "run")
    stop_at(trainer, 9)  # after the evaluation at 8, which the resumed run repeats
    with pytest.raises(Stop):
        trainer.run(loader(), max_epochs=2)

    resumed = evaluated_trainer(tmp_path / "run")
    resumed.run(loader(), max_epochs=2)
    resumed.metrics.report(12, {"val/after": 1.0})

    assert scalars(tmp_path / "run") == in_json(tmp_path / "run")
    for run in (".", "val", "test/a"):
        assert "fit/loss" in read(tmp_path / "run" / run).Tags()["scalars"]
    losses = read(tmp_path / "run" / "val").Scalars("fit/loss")
    assert [point.step for point in losses] == [0, 2, 4, 6, 8, 10, 12]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # a prefix leads nowhere else


def test_settings_and_versions_are_shown_as_text(tmp_path):
    make_trainer().attach(TensorBoard(tmp_path)).run(loader(), max_epochs=1)

    (event,) = read(tmp_path).Tensors("settings/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    settings = json.loads(text.removeprefix("```json\n").removesuffix("\n```"))
    assert settings["trainer"]["seed"] == 5
    assert settings["versions"]["python"] == sys.version.split()[0]


def layouts(folder: Path) -> list[tuple[int, list[str]]]:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    return [
        (
            event.step,
            [
                chart.title
                for category in Layout.FromString(event.tensor_proto.string_val[0]).category
                for chart in category.chart
            ],
        )
        for event in read(folder).Tensors("custom_scalars__config__")
    ]


def test_the_layout_grows_with_the_first_curve_of_a_chart_alone(tmp_path):
    trainer = make_trainer()
    report_each_epoch(trainer, 0.1, 0.3, tag="val/image_to_text/recall@1")
    trainer.attach(TensorBoard(tmp_path))

    trainer.run(loader(), max_epochs=2)

    loss, recall = "Loss: train and validation", "Recall@1, image to text"
    assert layouts(tmp_path) == [(4, [loss]), (6, [loss, recall])]


def hparams_of(folder: Path) -> set[str]:
    return {tag for tag in read(folder).Tags()["tensors"] if tag.startswith("_hparams_")}


def test_a_run_has_its_row_from_the_start_and_success_at_its_end(tmp_path):
    seen: list[set[str]] = []
    trainer = make_trainer().attach(TensorBoard(tmp_path))
    trainer.add_event_handler(Events.COMPLETED, lambda: seen.append(hparams_of(tmp_path)))

    trainer.run(loader(), max_epochs=1)

    row, success = "_hparams_/session_start_info", "_hparams_/session_end_info"
    assert seen == [{row}]
    assert hparams_of(tmp_path) == {row, success}


def test_a_run_that_broke_off_has_no_success(tmp_path):
    trainer = make_trainer().attach(TensorBoard(tmp_path))
    stop_at(trainer, 5)

    with pytest.raises(Stop):
        trainer.run(loader(), max_epochs=1)

    assert hparams_of(tmp_path) == {"_hparams_/session_start_info"}


def text_of(folder: Path, tag: str) -> list[tuple[int, str]]:
    return [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in read(folder).Tensors(f"{tag}/text_summary")
    ]


def test_model_and_listeners_are_shown_as_tables(tmp_path):
    make_trainer().attach(TensorBoard(tmp_path)).run(loader(), max_epochs=1)

    ((start, model),) = text_of(tmp_path, "model")
    ((end, listeners),) = text_of(tmp_path, "listeners")
    assert (start, end) == (0, 6)
    assert "| all | 26 | 26 |" in model
    assert "TensorBoard" in listeners


def test_findings_of_health_are_shown_at_the_step_at_which_they_were_made(tmp_path):
    health = RepresentationHealth(features=("logits",), rules=())
    trainer = make_trainer().attach(health, TensorBoard(tmp_path))

    def find() -> None:
        step = trainer.state.iteration
        health.findings.append(Finding("collapse", step, "spread 0", "Look."))

    trainer.add_event_handler(Events.ITERATION_STARTED(event_filter=lambda _, n: n in (2, 7)), find)

    trainer.run(loader(), max_epochs=2)

    (first_step, first), (second_step, second) = text_of(tmp_path, "findings")
    assert (first_step, second_step) == (2, 7)
    assert "**collapse**, step 2:" in first
    assert "step 7" not in first
    assert "**collapse**, step 7:" in second


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

    assert printed(code) == "False"


def test_a_board_that_two_handlers_share_is_attached_once(tmp_path):
    board = TensorBoard(tmp_path)
    trainer = make_trainer().attach(Histograms(board=board), Histograms(every=7, board=board))
    assert [handler for handler in trainer.handlers if handler is board] == [board]


def test_files_of_one_second_are_read_in_the_order_in_which_they_were_opened(tmp_path, monkeypatch):
    from diptych.handlers.sinks.event_file import EventFile

    monkeypatch.setattr("time.time", lambda: 1e9)
    opened = []
    for _ in range(12):  # numbers of one digit and of two
        EventFile(str(tmp_path)).close()
        opened.append(next(path.name for path in tmp_path.iterdir() if path.name not in opened))

    assert opened == sorted(opened)
