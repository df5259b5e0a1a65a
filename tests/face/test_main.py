"""The table of commands, and what the command line makes of its first argument."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest

from diptych.__main__ import COMMANDS, main
from diptych.version import __version__
from tests.losses.processes import printed as printed_by


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_there_is_a_table_of_them(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert f"{name} " in printed
        assert text in printed
    assert max(len(line) for line in printed.splitlines()) <= 80


def test_an_unknown_command_names_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certfy"]) == 2
    assert "got 'certfy'. Did you mean certify?" in capsys.readouterr().err


def test_an_unknown_command_near_none_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x"]) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in COMMANDS)
    assert "Did you mean" not in message


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diptych {__version__}\n"


def test_an_interrupted_command_ends_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("diptych.commands.info.run", interrupted)
    assert main(["info"]) == 130
    monkeypatch.setattr("diptych.__main__.import_module", interrupted)  # torch takes seconds
    assert main(["info"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_has_ended_ends_without_a_message(unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    printing = "import sys\nfrom diptych.__main__ import main\nsys.exit(main(['--help']))"

    done = subprocess.run(
        [sys.executable, "-c", printing],
        stdout=writing,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        check=False,
    )

    os.close(writing)
    assert (done.returncode, done.stderr) == (141 if unbuffered else 0, b"")


def test_another_pipe_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("diptych.commands.info.run", broken)
    with pytest.raises(BrokenPipeError):
        main(["info"])


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_documents_its_arguments(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])

    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: diptych {name}")
    description = str(import_module(COMMANDS[name][0]).__doc__).partition("\n")[0]
    assert description in " ".join(printed.split())  # argparse breaks lines


def test_no_command_is_imported_before_it_runs() -> None:
    script = (
        "import sys, diptych.__main__ as line\n"
        "line.main([])\n"
        "print([m for m in ('torch', *(m for m, _ in line.COMMANDS.values())) if m in sys.modules])"
    )

    assert printed_by(script).splitlines()[-1] == "[]"
