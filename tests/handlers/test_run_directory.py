"""Run directories: their names, and the files in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diptych.handlers import (
    JsonLines,
    RunDirectory,
    TensorBoard,
    default_handlers,
    latest_run,
    new_run,
    read_records,
)
from tests.handlers.runs import loader, make_trainer, reported_run


def test_every_run_has_a_new_folder_and_the_latest_is_the_last(tmp_path):
    runs = [new_run(tmp_path, "emoji") for _ in range(12)]

    assert len(set(runs)) == 12
    assert all(run.is_dir() and run.parent == tmp_path / "emoji" for run in runs)
    assert runs == sorted(runs)
    assert latest_run(tmp_path, "emoji") == runs[-1]


def test_a_run_is_the_latest_although_the_clock_has_gone_back(tmp_path, caplog):
    ahead = ["2199-12-31_23-59-59Z", "2199-12-31_23-59-59Z-002"]
    for name in (*ahead, "2250_notesZ"):
        (tmp_path / "emoji" / name).mkdir(parents=True)

    runs = [new_run(tmp_path, "emoji") for _ in range(2)]

    assert [run.name for run in runs] == [f"2199-12-31_23-59-59Z-00{number}" for number in (3, 4)]
    assert latest_run(tmp_path, "emoji") == runs[-1]
    assert "The clock has gone back" in caplog.text


def test_a_name_without_runs_has_no_latest_one(tmp_path):
    (tmp_path / "emoji" / "notes").mkdir(parents=True)

    assert latest_run(tmp_path, "emoji") is None
    assert latest_run(tmp_path, "other") is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_a_name_that_is_no_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="name must be the name of one directory"):
        new_run(tmp_path, name)


def make_run(root: Path) -> tuple[str, str]:
    return str(new_run(root, "emoji")), str(latest_run(root, "emoji"))


def latest_of(root: Path) -> Path | None:
    return latest_run(root, "none")


def test_all_ranks_get_the_folder_that_rank_zero_made(ranks, tmp_path):
    first, second = ranks.run(make_run, [(tmp_path,)] * 2)

    assert first == second
    assert first[0] == first[1]
    assert len(list((tmp_path / "emoji").iterdir())) == 1
    assert ranks.run(latest_of, [(tmp_path,)] * 2) == [None, None]


def test_a_directory_names_the_files_that_a_run_writes(tmp_path):
    trainer = make_trainer().attach(*default_handlers(tmp_path / "a"))
    trainer.run(loader(), max_epochs=1)

    run = RunDirectory(tmp_path / "a")

    files = (run.checkpoints, run.metrics, run.measured, run.settings)
    assert all(file.exists() and file.parent == run.path for file in files)
    assert RunDirectory(reported_run(tmp_path / "b")).report.exists()
    assert run.weights.parent == run.checkpoints
    assert run.name == f"{tmp_path.name}/a"


def test_the_file_of_measured_values_has_a_name_that_fits(tmp_path):
    assert JsonLines(tmp_path / "a.b.jsonl").measured_path == tmp_path / "a.b.measured.jsonl"
    name = JsonLines(tmp_path / f"{'a' * 249}.jsonl").measured_path.name

    assert len(name) == 255
    assert name.endswith(".measured.jsonl")


def test_a_directory_is_a_path_that_handlers_take(tmp_path):
    run = RunDirectory(tmp_path / "a")

    assert os.fspath(run) == str(run) == str(tmp_path / "a")
    assert run / "profile" == tmp_path / "a" / "profile"
    assert run == RunDirectory(str(tmp_path / "a"))
    assert JsonLines(run).path == run.metrics
    assert TensorBoard(run).directory == run.path
    with pytest.raises(FileNotFoundError):
        read_records(run)


def test_a_run_stays_in_its_directory_if_the_working_directory_changes(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer().attach(*default_handlers("runs/a"))
    monkeypatch.chdir(tmp_path / "elsewhere")

    trainer.run(loader(), max_epochs=1)

    assert list((tmp_path / "elsewhere").iterdir()) == []
    run = RunDirectory(tmp_path / "runs" / "a")
    assert len(list(run.path.glob("events.*"))) == 1
    assert len(list(run.checkpoints.glob("*.pt"))) == 1
    assert run.metrics.exists()
    assert run.settings.exists()
