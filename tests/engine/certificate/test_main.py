"""The certificate from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diptych.engine import ResumeError
from diptych.engine.certificate import __main__ as command
from diptych.engine.certificate import invariances

ROOT = Path(__file__).parents[3]
PLACE = "tests.engine.certificate.trainings"


@pytest.fixture
def _without_processes(monkeypatch):
    monkeypatch.setattr(invariances, "check_ranks", lambda *_: [])


in_this_process = pytest.mark.usefixtures("_without_processes")


def run_as_module(factory: str) -> tuple[int, list[str]]:
    """Return exit code and printed lines of the command, which starts two ranks."""
    command = [sys.executable, "-m", "diptych.engine.certificate", f"{PLACE}:{factory}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_the_command_passes_a_sound_training_on_two_ranks():
    code, lines = run_as_module("build")
    assert code == 0
    assert [line.split("  ")[0] for line in lines] == [
        "run as",
        "the whole batch",
        "micro-batches of 3",
        "tiles of 3",
        "two ranks, 4 + 4",
        "two ranks, 5 + 4",
        "with 0 handlers",
    ]
    assert all("equal" in line for line in lines[1:])


def test_the_command_names_a_factor_of_the_ranks_and_a_handler_that_changes_a_weight():
    code, lines = run_as_module("build_with_faults")
    assert code == 1
    ranks = [line for line in lines if line.startswith("two ranks")]
    assert len(ranks) == 2
    assert all("a factor of the number of ranks" in line for line in ranks)
    assert "Meddler.meddle changes weights" in lines[-1]


@in_this_process
def test_a_sound_training_passes(capsys):
    assert command.main([f"{PLACE}:build", "--microbatch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "micro-batches of 4" in out
    assert "CHANGES" not in out


@in_this_process
def test_what_breaks_the_promise_is_the_exit_code(capsys):
    assert command.main([f"{PLACE}:build_with_batch_norm"]) == 1
    assert "batch norm" in capsys.readouterr().out


@in_this_process
def test_an_interruption_is_checked_on_request(capsys):
    with pytest.raises(ResumeError, match="SeededLoader"):
        command.main([f"{PLACE}:build", "--interruption", "5"])
    assert command.main([f"{PLACE}:build_with_seeded_loader", "--interruption", "5"]) == 0
    assert "interrupted after 1 of 5 iterations: nothing changes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nothing", f"{PLACE}:", f"{PLACE}:missing"])
def test_a_factory_that_is_not_there_is_a_clear_error(name: str):
    with pytest.raises(ValueError, match="factory must be"):
        command.main([name])
