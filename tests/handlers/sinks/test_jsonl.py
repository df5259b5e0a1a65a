"""metrics.jsonl: the content of its lines, also after interruptions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from ignite.engine import Events

from diptych.engine import ResumeError, Trainer
from diptych.engine.metrics.metrics_collector import Record
from diptych.handlers import CheckpointManager, JsonLines, Throughput, read_records
from tests.handlers.runs import Stop, kept_records, loader, make_trainer, report_each_epoch, stop_at


def logged(folder: Path, values: dict[str, float], step: int = 7) -> str:
    trainer = make_trainer().attach(JsonLines(folder))
    trainer.add_event_handler(Events.COMPLETED, lambda: trainer.metrics.report(step, values))
    trainer.run(loader(), max_epochs=1)
    return (folder / "metrics.jsonl").read_text().splitlines()[-1]


def test_a_record_is_a_line_of_its_step_and_its_sorted_tags(tmp_path):
    line = logged(tmp_path, {"val/recall@5": 0.25, "val/loss": 1 / 3})

    assert line == '{"step": 7, "val/loss": 0.3333333333333333, "val/recall@5": 0.25}'


def test_every_record_of_the_run_is_in_the_file(tmp_path):
    trainer = make_trainer().attach(JsonLines(tmp_path))
    records = kept_records(trainer)
    report_each_epoch(trainer, 0.1, 0.2)

    trainer.run(loader(), max_epochs=2)

    assert [record.step for record in records] == [4, 6, 6, 8, 12, 12]
    assert read_records(tmp_path) == records


def test_numbers_that_json_lacks_are_strings_that_float_reads(tmp_path):
    line = logged(tmp_path, {"a": math.nan, "b": math.inf, "c": -math.inf})

    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 7,
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
    }
    values = read_records(tmp_path)[-1].values
    assert math.isnan(values["a"])
    assert (values["b"], values["c"]) == (math.inf, -math.inf)


def test_measured_values_have_a_file_of_their_own(tmp_path):
    trainer = make_trainer().attach(Throughput(), JsonLines(tmp_path / "log.jsonl"))

    trainer.run(loader(), max_epochs=1)

    steps = [record.step for record in read_records(tmp_path / "log.jsonl")]
    assert all(set(r.values) == {"train/loss"} for r in read_records(tmp_path / "log.jsonl"))
    measured = read_records(tmp_path / "log.measured.jsonl")
    assert [record.step for record in measured] == steps == [4, 6]
    assert set(measured[0].values) == {"time/samples_per_second", "time/step", "time/data"}


def test_the_tag_step_is_logged_and_costs_its_record_alone(tmp_path, caplog):
    trainer = make_trainer().attach(JsonLines(tmp_path))
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED(once=1), lambda: trainer.metrics.report(6, {"step": 1.0})
    )

    trainer.run(loader(), max_epochs=2)

    assert [r.step for r in read_records(tmp_path)] == [4, 6, 8, 12]
    assert caplog.text.count("a tag must not be 'step'") == 1


def test_a_record_logged_before_the_handler_starts_comes_first(tmp_path):
    trainer = make_trainer()
    trainer.add_event_handler(Events.STARTED, lambda: trainer.metrics.report(0, {"val/loss": 0.5}))
    trainer.attach(JsonLines(tmp_path))

    trainer.run(loader(), max_epochs=1)

    assert read_records(tmp_path)[0] == Record(0, {"val/loss": 0.5})


def saving_trainer(folder: Path) -> Trainer:
    trainer = make_trainer()
    trainer.add_event_handler(Events.STARTED, lambda: _report_start(trainer))
    report_each_epoch(trainer, 0.1, 0.2, 0.3)
    return trainer.attach(Throughput(), JsonLines(folder), CheckpointManager(folder, every=5))


def _report_start(trainer: Trainer) -> None:
    if trainer.state.iteration == 0:
        trainer.metrics.report(0, {"val/recall@1": 0.0})


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 9, 12, 17])
def test_an_interrupted_and_resumed_run_leaves_the_bytes_of_the_untouched_one(tmp_path, stop):
    saving_trainer(tmp_path / "untouched").run(loader(), max_epochs=3)
    interrupted = saving_trainer(tmp_path / "interrupted")
    stop_at(interrupted, stop)
    with pytest.raises(Stop):
        interrupted.run(loader(), max_epochs=3)

    saving_trainer(tmp_path / "interrupted").run(loader(), max_epochs=3)

    expected = (tmp_path / "untouched/metrics.jsonl").read_bytes()
    assert (tmp_path / "interrupted/metrics.jsonl").read_bytes() == expected
    for name in ("untouched", "interrupted"):
        steps = [r.step for r in read_records(tmp_path / name / "metrics.measured.jsonl")]
        assert steps == [4, 6, 8, 12, 16, 18]


def test_a_line_that_a_kill_cut_short_is_gone_after_resuming(tmp_path):
    first = saving_trainer(tmp_path)
    stop_at(first, 9)
    with pytest.raises(Stop):
        first.run(loader(), max_epochs=3)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "train/lo')
    assert [r.step for r in read_records(tmp_path)] == [0, 4, 6, 6, 8]

    saving_trainer(tmp_path).run(loader(), max_epochs=3)

    assert [r.step for r in read_records(tmp_path)] == [0, 4, 6, 6, 8, 12, 12, 16, 18, 18]


def test_loading_an_old_checkpoint_to_look_at_it_cuts_nothing(tmp_path):
    trainer = saving_trainer(tmp_path)
    trainer.run(loader(), max_epochs=3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    manager = trainer.handlers[-1]
    assert isinstance(manager, CheckpointManager)

    manager.load_checkpoint(min(tmp_path.glob("*.pt")))
    trainer.metrics.report(18, {"test/recall@1": 0.5})

    after = (tmp_path / "metrics.jsonl").read_bytes()
    assert after == before + b'{"step": 18, "test/recall@1": 0.5}\n'


def test_a_run_that_starts_over_empties_the_file(tmp_path):
    make_trainer().attach(JsonLines(tmp_path)).run(loader(), max_epochs=2)

    make_trainer().attach(JsonLines(tmp_path)).run(loader(), max_epochs=1)

    assert [r.step for r in read_records(tmp_path)] == [4, 6]


def test_a_run_continued_in_the_same_process_appends(tmp_path):
    trainer = make_trainer().attach(JsonLines(tmp_path))

    trainer.run(loader(), max_epochs=1)
    trainer.run(loader(), max_epochs=2)

    assert [r.step for r in read_records(tmp_path)] == [4, 6, 8, 12]


def test_a_file_that_lost_lines_since_the_checkpoint_is_an_error(tmp_path):
    saving_trainer(tmp_path).run(loader(), max_epochs=2)
    (tmp_path / "metrics.jsonl").write_bytes(b"")

    with pytest.raises(ResumeError, match=r"metrics.jsonl must hold.* line 1 of \d+ is missing"):
        saving_trainer(tmp_path).run(loader(), max_epochs=3)


def test_a_file_that_was_moved_away_is_started_again(tmp_path):
    saving_trainer(tmp_path).run(loader(), max_epochs=2)
    (tmp_path / "metrics.jsonl").unlink()

    saving_trainer(tmp_path).run(loader(), max_epochs=3)

    assert [r.step for r in read_records(tmp_path)] == [16, 18, 18]
