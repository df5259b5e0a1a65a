"""metrics.jsonl: the content of its lines, also after interruptions."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

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


def saving_trainer(folder: Path, **settings: Any) -> Trainer:
    trainer = make_trainer()
    trainer.add_event_handler(Events.STARTED, lambda: _report_start(trainer))
    report_each_epoch(trainer, 0.1, 0.2, 0.3, 0.4)
    lines = JsonLines(folder, **settings)
    return trainer.attach(Throughput(), lines, CheckpointManager(folder, every=5))


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


def test_a_file_that_was_moved_away_is_started_again_and_that_is_logged(tmp_path, caplog):
    saving_trainer(tmp_path).run(loader(), max_epochs=2)
    (tmp_path / "metrics.jsonl").unlink()

    saving_trainer(tmp_path).run(loader(), max_epochs=3)

    assert [r.step for r in read_records(tmp_path)] == [16, 18, 18]
    said = f"{tmp_path / 'metrics.jsonl'} is missing; the run continues with a new file."
    assert said in caplog.text


def interrupted_run(folder: Path) -> None:
    """Leave a run of which a checkpoint, and lines before and after it, are there."""
    trainer = saving_trainer(folder)
    stop_at(trainer, 17)
    with pytest.raises(Stop):
        trainer.run(loader(), max_epochs=3)


def flip(data: bytes, at: int, chance: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]


def drop(data: bytes, at: int, chance: random.Random) -> bytes:
    return data[:at] + data[at + chance.randint(1, 40) :]


def insert(data: bytes, at: int, chance: random.Random) -> bytes:
    return data[:at] + chance.choice([b"\n", b"\r", b"1", b"\0" * 9, b"{}\n"]) + data[at:]


def swap(data: bytes, at: int, _: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    number = min(data[:at].count(b"\n"), len(lines) - 2)
    lines[number : number + 2] = lines[number + 1], lines[number]
    return b"".join(lines)


def cut_off(data: bytes, at: int, _: random.Random) -> bytes:
    return data[:at]


DAMAGES = (flip, drop, insert, swap, cut_off)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.measured.jsonl"])
def test_any_damage_before_the_checkpoint_is_reported_with_file_and_line(tmp_path, damage, name):
    interrupted_run(tmp_path)
    path, chance = tmp_path / name, random.Random(1)
    whole = path.read_bytes()
    known = whole[: whole.index(b'{"step": 16,')]
    for _ in range(5):
        at = chance.randrange(len(known))
        damaged = damage(known, at, chance)
        if damaged == known:
            continue
        damaged += whole[len(known) :]
        path.write_bytes(damaged)
        pairs = itertools.zip_longest(whole.split(b"\n"), damaged.split(b"\n"))
        first = next(number for number, pair in enumerate(pairs, 1) if pair[0] != pair[1])

        with pytest.raises(ResumeError, match=rf"{name} must hold .* line {first} .*set_aside"):
            saving_trainer(tmp_path).run(loader(), max_epochs=3)

        assert path.read_bytes() == damaged, "the error has changed the file"
    path.write_bytes(whole)
    saving_trainer(tmp_path).run(loader(), max_epochs=3)
    assert [r.step for r in read_records(tmp_path)] == [0, 4, 6, 6, 8, 12, 12, 16, 18, 18]


def test_damage_after_the_checkpoint_is_cut_off_with_the_lines_there(tmp_path):
    interrupted_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'{"step": 16,', b'\xff"step": 16,'))

    saving_trainer(tmp_path).run(loader(), max_epochs=3)

    assert [r.step for r in read_records(tmp_path)] == [0, 4, 6, 6, 8, 12, 12, 16, 18, 18]


def test_on_request_a_run_continues_beside_a_damaged_file(tmp_path, caplog):
    interrupted_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    damaged = path.read_bytes().replace(b'{"step": 4,', b'{"step": 5,')
    path.write_bytes(damaged)
    (tmp_path / "metrics.damaged.jsonl").write_text("an earlier one")

    saving_trainer(tmp_path, damaged="set_aside").run(loader(), max_epochs=3)

    assert (tmp_path / "metrics.damaged-2.jsonl").read_bytes() == damaged
    assert [r.step for r in read_records(tmp_path)] == [16, 18, 18]
    assert f"{path} is damaged: line 2 has changed. It is kept as metrics.damaged-2.jsonl" in (
        caplog.text
    )
    caplog.clear()
    saving_trainer(tmp_path).run(loader(), max_epochs=4)
    assert "damaged" not in caplog.text


def test_a_checkpoint_without_a_digest_continues_with_one_line_in_the_log(tmp_path, caplog):
    make_trainer().attach(JsonLines(tmp_path)).run(loader(), max_epochs=1)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    sink = JsonLines(tmp_path)
    sink.load_state_dict({"values": len(before), "measured": 0})
    trainer = make_trainer().attach(sink)

    trainer.run(loader(), max_epochs=1)

    text = "The checkpoint has no digest of"
    assert caplog.text.count(text) == 1
    assert (tmp_path / "metrics.jsonl").read_bytes() == before * 2
    state = sink.state_dict()["values"]
    assert state["size"] == 2 * len(before)
    (tmp_path / "metrics.jsonl").write_bytes(before + before.replace(b"4", b"3"))
    again = JsonLines(tmp_path)
    again.load_state_dict(sink.state_dict())
    with pytest.raises(ResumeError, match="line 3 has changed"):
        make_trainer().attach(again).run(loader(), max_epochs=1)


def test_a_sink_that_is_new_in_a_resumed_run_keeps_the_lines_that_are_there(tmp_path):
    trainer = make_trainer().attach(CheckpointManager(tmp_path))
    trainer.run(loader(), max_epochs=1)
    line = b'{"step": 4, "train/loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(line + b'{"step": 6, "train/lo')

    make_trainer().attach(JsonLines(tmp_path), CheckpointManager(tmp_path)).run(loader(), 2)

    assert [r.step for r in read_records(tmp_path)] == [4, 8, 12]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_read_as_an_error_with_file_line_and_a_way_out(tmp_path, damage):
    make_trainer(log_every=1).attach(JsonLines(tmp_path)).run(loader(), max_epochs=2)
    (tmp_path / "metrics.digest.json").unlink()
    path, chance = tmp_path / "metrics.jsonl", random.Random(2)
    whole, messages = path.read_bytes(), list[str]()
    for _ in range(40):
        path.write_bytes(damage(whole, chance.randrange(len(whole)), chance))
        try:
            assert all(type(record.step) is int for record in read_records(tmp_path))
        except ValueError as error:
            messages.append(f"{type(error).__name__} {error}")
    form = rf"ValueError {re.escape(str(path))}, line \d+, must be a record .* or remove the line"
    assert [message for message in messages if not re.match(form, message)] == []
    assert messages or damage in {swap, cut_off}  # what is left may be whole lines


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.measured.jsonl"])
def test_with_its_digest_any_damage_to_a_line_is_an_error(tmp_path, damage, name):
    trainer = make_trainer(log_every=1).attach(Throughput(), JsonLines(tmp_path))
    trainer.run(loader(), max_epochs=2)
    path, chance = tmp_path / name, random.Random(2)
    whole = path.read_bytes()
    for _ in range(20):
        damaged = damage(whole, chance.randrange(len(whole)), chance)
        path.write_bytes(damaged)
        if damaged != whole:
            with pytest.raises(
                ValueError, match=rf"{name} must hold .* line \d+ .* remove metrics"
            ):
                read_records(path)
    path.write_bytes(whole + b'{"step": 13, "a": 1}\n')  # written after the digest
    assert read_records(path)[-1].step == 13


def test_a_damaged_digest_is_named_with_the_way_out(tmp_path):
    make_trainer(log_every=1).attach(JsonLines(tmp_path)).run(loader(), max_epochs=2)
    path, chance = tmp_path / "metrics.digest.json", random.Random(2)
    whole, records = path.read_bytes(), read_records(tmp_path)
    for _ in range(60):
        path.write_bytes(flip(whole, chance.randrange(len(whole)), chance))
        with pytest.raises(ValueError, match=r"metrics.digest.json must be .* remove it: the line"):
            read_records(tmp_path)
    path.unlink()
    assert read_records(tmp_path) == records


def test_a_run_that_is_killed_while_it_resumes_can_be_read(tmp_path):
    """Lines are cut off when a run resumes, and the digest must not know them any more."""
    interrupted_run(tmp_path)
    again = saving_trainer(tmp_path)
    again.add_event_handler(Events.STARTED, lambda: shutil.copytree(tmp_path, tmp_path / "killed"))

    again.run(loader(), max_epochs=3)

    assert [r.step for r in read_records(tmp_path / "killed")] == [0, 4, 6, 6, 8, 12, 12]
    assert (tmp_path / "killed/metrics.digest.json").is_file()


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"{}", b"[1]", b"null", b"[" * 10_000, b'{"step": "4"}', b'{"step": 1.5}'),
        *(b'{"step": true, "a": 1}', b'{"step": 1, "a": "x"}', b'{"step": 1, "a": null}'),
        b'{"step": 1, "a": []}',
    ],
)
def test_a_line_of_another_form_is_an_error_with_its_number(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 1.0}\n' + line + b"\n")

    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, must be a record"):
        read_records(tmp_path)


def test_a_link_in_a_run_directory_from_elsewhere_is_not_written_through(tmp_path, caplog):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(precious)
    (tmp_path / "run/metrics.digest.json").symlink_to(precious)

    trainer = make_trainer().attach(JsonLines(tmp_path / "run"))
    trainer.run(loader(), max_epochs=1)

    assert precious.read_text() == "precious"
    assert trainer.state.iteration == 6
    assert "metrics.jsonl: [Errno 40] it is a symbolic link; remove it" in caplog.text


def test_an_incomplete_last_line_is_left_out_and_logged(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 1.0}\n{"step": 2, "a"')

    assert read_records(tmp_path) == [Record(1, {"a": 1.0})]
    assert "metrics.jsonl ends inside line 2, which is left out" in caplog.text


def test_another_word_for_damaged_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="damaged must be one of refuse, set_aside, got 'ignore'"):
        JsonLines(tmp_path, damaged="ignore")


@pytest.mark.parametrize(
    "line", ['{"step": 1%s, "a": 1}', '{"step": 1, "a": 1%s}', r'{"step": 1, "\ud800%s": 1}']
)
def test_a_line_with_a_number_or_a_tag_that_nobody_can_show_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text((line % ("0" * 400)) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1, must be a record"):
        read_records(tmp_path)
