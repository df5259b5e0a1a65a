"""The certificate from the command line."""

from __future__ import annotations

import pytest

from diptych.engine import ResumeError
from diptych.engine.certify import __main__ as command
from diptych.engine.certify import invariances

PLACE = "tests.engine.certify.trainings"


@pytest.fixture(autouse=True)
def _without_processes(monkeypatch):
    monkeypatch.setattr(invariances, "check_ranks", lambda *_: [])


def test_a_sound_training_passes(capsys):
    assert command.main([f"{PLACE}:build", "--microbatch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert "micro-batches of 4" in out
    assert "CHANGES" not in out


def test_what_breaks_the_promise_is_the_exit_code(capsys):
    assert command.main([f"{PLACE}:build_with_batch_norm"]) == 1
    assert "batch norm" in capsys.readouterr().out


def test_an_interruption_is_checked_on_request(capsys):
    with pytest.raises(ResumeError, match="SeededLoader"):
        command.main([f"{PLACE}:build", "--interruption", "5"])
    assert command.main([f"{PLACE}:build_with_seeded_loader", "--interruption", "5"]) == 0
    assert "interrupted after 1 of 5 iterations: nothing changes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nothing", f"{PLACE}:", f"{PLACE}:missing"])
def test_a_factory_that_is_not_there_is_a_clear_error(name: str):
    with pytest.raises(ValueError, match="factory must be"):
        command.main([name])
