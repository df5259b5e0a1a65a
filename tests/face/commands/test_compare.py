"""`diptych compare`: runs side by side."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diptych.__main__ import main
from tests.handlers.runs import reported_run


def test_the_command_compares_runs_without_a_warning(tmp_path):
    folders = [reported_run(tmp_path / "a"), reported_run(tmp_path / "b", microbatch_size=1)]
    output = tmp_path / "both.html"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "diptych", "compare"]

    done = subprocess.run(
        [*command, *folders, "--output", output], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "trainer.microbatch_size" in done.stdout
    assert "val/recall@1" in done.stdout
    assert "<svg" in output.read_text("utf-8")


def test_a_directory_without_a_run_is_named(tmp_path, capsys):
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("diptych compare: error: ")
    assert str(tmp_path) in message


def test_a_single_run_is_too_few(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(tmp_path)])

    assert stopped.value.code == 2
    assert "required: RUN" in capsys.readouterr().err
