"""No name that a file holds leads out of the directory it is about."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.handlers.contained_paths import contained_path, is_plain_file, open_file

ANYTHING = re.compile(r"(?s).*")
PARTS = ["..", ".", "", "a", "/", "\\", "C:", "\0", "~", "*", " ", "\n", "a.pt", "ä", "\udc80"]
NAMES = st.one_of(
    st.text(max_size=300),
    st.lists(st.sampled_from(PARTS), max_size=6).map("".join),
    st.lists(st.sampled_from(PARTS), max_size=6).map("/".join),
    st.none() | st.integers() | st.binary() | st.lists(st.text(), max_size=2),
)


@settings(max_examples=400, deadline=None)
@given(NAMES)
def test_whatever_name_is_read_the_path_is_a_child_of_the_folder_or_an_error(name):
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = contained_path(Path(folder), name, ANYTHING)
        except ValueError:
            return
        path.touch()
        assert [inside.name for inside in Path(folder).iterdir()] == [name]


def test_a_name_must_match_the_whole_pattern(tmp_path):
    pattern = re.compile(r"a\d")
    assert contained_path(tmp_path, "a1", pattern) == tmp_path / "a1"
    for name in ("a", "a1\n", "a12", "A1", "ba1"):
        with pytest.raises(ValueError, match="must be one that is given to such files here, got"):
            contained_path(tmp_path, name, pattern)


@pytest.mark.parametrize("target", ["file", "missing", "."])
def test_a_symbolic_link_is_refused_by_name(tmp_path, target):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ValueError, match=r"link must not be a symbolic link"):
        contained_path(tmp_path, "link", ANYTHING)


def test_a_plain_file_is_neither_a_link_nor_a_folder_nor_a_pipe(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    plain = [path.name for path in tmp_path.iterdir() if is_plain_file(path)]
    assert plain == ["file"]
    assert not is_plain_file(tmp_path / "missing")
    assert not is_plain_file(Path("a\0b"))


def test_a_pipe_or_a_device_is_not_read_and_nobody_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "text").write_bytes(b"words")
    for name in ("pipe", "endless"):
        with pytest.raises(OSError, match="it is a pipe or a device, not a file"):
            open_file(tmp_path / name)
    with open_file(tmp_path / "text") as file:
        assert file.read() == b"words"
