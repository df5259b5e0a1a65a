"""`diptych compare`: runs side by side."""

from __future__ import annotations

import json
import re
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
    what, best = done.stdout.index("trainer.microbatch_size"), done.stdout.index("val/recall@1")
    assert what < best
    assert "0.75 (step 12)" in done.stdout
    assert len(done.stdout.splitlines()) <= 9
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


def damaged(message: str, capsys: pytest.CaptureFixture[str], *folders: object) -> None:
    """Check that comparing ends with a message of one line, and no traceback."""
    assert main(["compare", *map(str, folders), "--output", str(folders[0]) + ".html"]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"diptych compare: error: .*{message}.*\n", error), error


def test_a_file_that_is_damaged_is_an_error_with_file_line_and_way_out(tmp_path, capsys):
    whole, run = reported_run(tmp_path / "a"), reported_run(tmp_path / "b")
    for name, old, new, message in (
        ("metrics.jsonl", b'"step": 8', b'"step": 9', "line 4 has changed. Restore the file"),
        ("metrics.digest.json", b'"size": ', b'"size": 1', "or remove it: the lines are then not"),
        (
            "settings.json",
            b'"seed": 5',
            b'"seed": 6',
            "or remove it: the run is then shown without",
        ),
        ("settings.json", b"{", b"[", "or remove it: the run is then shown without its settings"),
        ("identity.json", b'"', b"", "or remove it: the runs' settings are then compared"),
    ):
        path = run / name
        content = path.read_bytes()
        path.write_bytes(content.replace(old, new, 1))
        damaged(rf"{name} .*{message}", capsys, whole, run)
        path.write_bytes(content)
    (run / "metrics.digest.json").unlink()
    (run / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 1}\nnothing\n')
    damaged(r"metrics.jsonl, line 2, must be a record .* or remove the line", capsys, whole, run)


def test_an_output_that_cannot_be_written_is_an_error_of_one_line(tmp_path, capsys):
    folders = [reported_run(tmp_path / "a"), reported_run(tmp_path / "b")]

    assert main(["compare", *map(str, folders), "--output", str(tmp_path / "no" / "x.html")]) == 2

    assert "x.html cannot be written: No such file or directory. Give another file." in (
        capsys.readouterr().err
    )


def test_a_run_of_an_earlier_version_is_compared_without_digests(tmp_path, capsys):
    folders = [reported_run(tmp_path / "a"), reported_run(tmp_path / "b", microbatch_size=1)]
    for folder in folders:
        for name in ("metrics.digest.json", "identity.json"):
            (folder / name).unlink()
        settings = json.loads((folder / "settings.json").read_text())
        del settings["sealed"], settings["digest"]
        (folder / "settings.json").write_text(json.dumps(settings))

    assert main(["compare", *map(str, folders), "--output", str(tmp_path / "x.html")]) == 0
    shown = capsys.readouterr().out
    assert "trainer.microbatch_size" in shown
    assert "digest" not in shown


def test_what_a_terminal_would_obey_is_printed_as_text(tmp_path, capsys):
    run = reported_run(tmp_path / "a")
    (run / "metrics.digest.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 90, "clear\\u001b[2Jthe screen": 1.0}\n')
    assert main(["compare", str(run), str(run), "--output", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "nothing that decides the results" in printed
    assert r"clear\x1b[2Jthe screen" in printed
    assert "\x1b" not in printed
