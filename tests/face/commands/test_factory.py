"""The function that a command is given as `module:function`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diptych.commands.factory import find_factory


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train", r"factory must be module:function, such as train:build, got 'train'\."),
        ("train:", "got 'train:'"),
        (":build", "got ':build'"),
        ("no_such_module:build", "got 'no_such_module': No module named 'no_such_module'"),
        ("json:nothing", "a function of module 'json', got 'nothing', which is missing there"),
        ("json:__doc__", "got '__doc__', which is no function"),
    ],
)
def test_a_factory_that_cannot_be_found_is_an_error_that_says_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_factory(text)


def test_a_module_of_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_training_of_ones_own.py").write_text("def build():\n    return 'built'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])

    assert find_factory("a_training_of_ones_own:build")() == "built"


def test_what_a_module_fails_to_import_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_another.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])

    with pytest.raises(ValueError, match="No module named 'no_such_package'"):
        find_factory("needs_another:build")
