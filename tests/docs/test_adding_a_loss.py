"""The instructions of the page "Writing a loss", carried out in a copy of the repository."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_a_loss.md").read_text("utf-8")
BLOCK = re.compile(
    r'^```(?P<kind>python|diff|bash)(?: title="(?P<path>[^"]+)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
TARGETS = {
    "make public-names": [sys.executable, "tests/test_public_names.py"],
    "make test": [sys.executable, "-m", "pytest", "-v", "-m", "not slow"],
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository, whose packages are the installed ones for its processes."""
    repository = tmp_path / "repository"
    unwanted = shutil.ignore_patterns("__pycache__")
    for folder in ("face", "engine", "handlers", "losses", "recipes", "tests", "docs"):
        shutil.copytree(ROOT / folder, repository / folder, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", repository)
    return repository


def apply(diff: str, text: str) -> str:
    """Return a text with a block's added lines after the block's other lines.

    Raises:
        ValueError: If the text does not contain the other lines, together, exactly once.
    """
    lines = diff.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines)
    if len(re.findall(f"^(?={re.escape(before)}$)", text, re.MULTILINE)) != 1:
        raise ValueError(f"not found exactly once:\n{before}")
    return re.sub(f"^{re.escape(before)}$", lambda _: after, text, flags=re.MULTILINE)


def follow(repository: Path) -> list[str]:
    """Write the page's files, make its changes and return its commands."""
    commands: list[str] = []
    for block in BLOCK.finditer(PAGE):
        if block["kind"] == "bash":
            commands += block["text"].splitlines()
        elif block["path"]:
            path = repository / block["path"]
            is_new = block["kind"] == "python"
            assert path.exists() != is_new
            text = block["text"] if is_new else apply(block["text"], path.read_text("utf-8"))
            path.write_text(text, encoding="utf-8")
    return commands


def run(command: str, repository: Path) -> str:
    """Run a command of the page with this interpreter, and return what it prints."""
    target = next(target for target in TARGETS if command.startswith(target))
    rest = command.removeprefix(target).strip()
    arguments = shlex.split(shlex.split(rest)[0].removeprefix("ARGS=")) if rest else []
    done = subprocess.run(
        [*TARGETS[target], *arguments],
        cwd=repository,
        env=os.environ
        | {"PYTHONPATH": str(repository / "face" / "uninstalled"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_loss_is_added_by_following_the_page(copy: Path) -> None:
    public_names, test = follow(copy)

    run(public_names, copy)
    verdicts = run(test, copy)

    assert "diptych.losses.HingePairsLoss" in (copy / "tests/public_names.txt").read_text("utf-8")
    for sentence in (
        "test_every_loss_keeps_the_contract[hinge_pairs-gradients]",
        "test_every_loss_is_the_same_on_one_two_and_three_ranks[hinge_pairs]",
        "test_value_is_the_mean_over_images_of_the_summed_violations",
        "test_a_public_name_is_in_the_reference_once[diptych.losses.HingePairsLoss]",
        "test_the_tables_list_every_loss_and_no_other",
    ):
        assert f"{sentence} PASSED" in verdicts


def test_the_code_of_the_page_passes_the_repositorys_checks(copy: Path) -> None:
    pytest.importorskip("ruff", reason="the development tools are not installed")
    follow(copy)
    new = ["losses/contrastive/hinge_pairs.py", "losses/__init__.pyi"]
    new += ["tests/losses/contrastive/test_hinge_pairs.py"]

    for check in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "--no-cache", *new],
            cwd=copy,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_a_change_to_missing_lines_is_an_error() -> None:
    assert apply(" a\n+b\n", "x\na\n") == "x\na\nb\n"
    for text in ("x\n", "a\na\n", "xa\n"):
        with pytest.raises(ValueError, match="not found exactly once"):
            apply(" a\n+b\n", text)
