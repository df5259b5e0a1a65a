"""`diptych certify`: the certificate from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diptych.__main__ import main
from diptych.engine.certificate import invariances

ROOT = Path(__file__).parents[3]
TRAININGS = "tests.engine.certificate.trainings"


@pytest.fixture
def _without_processes(monkeypatch):
    monkeypatch.setattr(invariances, "check_ranks", lambda *_: [])


in_this_process = pytest.mark.usefixtures("_without_processes")


def test_the_command_names_a_factor_of_the_ranks_and_a_handler_that_changes_a_weight():
    command = [sys.executable, "-m", "diptych", "certify", f"{TRAININGS}:build_with_faults"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    ranks = [line for line in lines if line.startswith("two ranks")]
    assert len(ranks) == 2
    assert all("a factor of the number of ranks" in line for line in ranks)
    assert "Meddler.meddle changes weights" in lines[-1]


@in_this_process
def test_a_sound_training_passes(capsys):
    assert main(["certify", f"{TRAININGS}:build", "--microbatch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "micro-batches of 4" in out
    assert "CHANGES" not in out


@in_this_process
def test_the_exit_code_is_one_if_something_changes_the_result(capsys):
    assert main(["certify", f"{TRAININGS}:build_with_batch_norm"]) == 1
    assert "batch norm" in capsys.readouterr().out


@in_this_process
def test_an_interruption_is_checked_on_request(capsys):
    factory = f"{TRAININGS}:build_with_seeded_loader"
    assert main(["certify", factory, "--interruption", "5"]) == 0
    assert "interrupted after 1 of 5 iterations: nothing changes" in capsys.readouterr().out


@in_this_process
@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("build_with_torch_loader", ["--interruption", "5"], "SeededLoader"),
        ("build", ["--interruption", "1"], "--interruption must be >= 2, got 1"),
        ("build", ["--microbatch-size", "0"], "--microbatch-size must be >= 1, got 0"),
        ("trainer_of", [], "factory must return a Trainer and its loader, got Trainer"),
        ("missing", [], "factory must be a function of module"),
    ],
)
def test_unusable_input_is_one_line_and_exit_code_two(capsys, factory, options, message):
    assert main(["certify", f"{TRAININGS}:{factory}", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diptych certify: error: ")
    assert message in line


def test_an_error_of_the_users_own_code_keeps_its_traceback(tmp_path, monkeypatch):
    text = "def build():\n    raise ValueError('an error of their own')\n"
    (tmp_path / "a_faulty_training.py").write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match="an error of their own"):
        main(["certify", "a_faulty_training:build"])
