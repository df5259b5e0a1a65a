"""Files are written whole or not at all, on file systems as they are."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from diptych.handlers import files
from diptych.handlers.files import (
    flush_folder,
    replace_file,
    unfinished_path,
    write_atomically,
)


def test_a_link_at_the_path_or_beside_it_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "precious").write_text("precious")
    for name in ("report.html", "report.html.unfinished"):
        (tmp_path / name).symlink_to("precious")
    write_atomically(tmp_path / "report.html", "new")
    write_atomically(tmp_path / "report.html", lambda path: path.write_text("newer"))
    assert not (tmp_path / "report.html").is_symlink()
    assert (tmp_path / "report.html").read_text() == "newer"
    assert (tmp_path / "precious").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "report.html"]


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127 + "b", "a" * 245, "a" * 246])
def test_a_name_of_255_bytes_can_be_written(tmp_path, name):
    write_atomically(tmp_path / name, "one")
    write_atomically(tmp_path / name, "two")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "two"


def test_long_names_that_begin_alike_have_unfinished_files_of_their_own(tmp_path):
    first, second = (unfinished_path(tmp_path / ("a" * 250 + end)) for end in "bc")
    assert first != second
    assert all(len(path.name) <= 255 and path.suffix == ".unfinished" for path in (first, second))


def fail_for_folders(monkeypatch, number: int, *, at: str) -> None:
    """Let the flush, or the opening, of folders fail."""
    flush, open_ = os.fsync, os.open

    def fsync(descriptor: int) -> None:
        if at == "fsync" and stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    def opened(path, *rest, **options):
        if at == "open" and Path(path).is_dir():
            raise OSError(number, os.strerror(number))
        return open_(path, *rest, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize("at", ["fsync", "open"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.ENOTSUP, errno.EBADF])
def test_a_folder_that_cannot_be_flushed_is_logged_once(tmp_path, monkeypatch, caplog, at, number):
    fail_for_folders(monkeypatch, number, at=at)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        flush_folder(tmp_path / name, of=tmp_path)
        flush_folder(tmp_path)
    (message,) = caplog.messages
    assert message.startswith(f"The file system of {tmp_path} cannot flush")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_flush_that_fails_is_an_error(tmp_path, monkeypatch, number):
    fail_for_folders(monkeypatch, number, at="fsync")
    with pytest.raises(OSError, match=os.strerror(number)):
        flush_folder(tmp_path)


def test_a_file_that_cannot_be_flushed_counts_and_one_whose_flush_fails_does_not(
    tmp_path, monkeypatch, caplog
):
    def flush(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", flush)
    number = errno.EINVAL
    write_atomically(tmp_path / "a", "new")
    write_atomically(tmp_path / "b", "new")
    assert len(caplog.messages) == 1
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_atomically(tmp_path / "a", "newer")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}


def test_a_file_system_that_cannot_rename_over_a_file(tmp_path, monkeypatch):
    rename = Path.replace

    def replace(source: Path, target: Path) -> Path:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "File exists")
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    for content in ("one", "two"):
        write_atomically(tmp_path / "a", content)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "two"}


def test_a_rename_that_destroys_the_old_file_and_fails_leaves_the_new_content(
    tmp_path, monkeypatch
):
    def replace(_: Path, target: Path) -> Path:
        target.write_text("ne")
        raise OSError(errno.EIO, "Input/output error")

    write_atomically(tmp_path / "a", "old")
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a.unfinished").read_text() == "new"


def test_a_rename_that_fails_and_changes_nothing_leaves_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("failures", [2, 3])
def test_a_file_that_another_program_has_open_is_replaced_a_little_later(
    tmp_path, monkeypatch, failures
):
    rename, left = Path.replace, [failures]

    def replace(source: Path, target: Path) -> Path:
        if left[0]:
            left[0] -= 1
            raise PermissionError(errno.EACCES, "used by another process")
        return rename(source, target)

    monkeypatch.setattr(files, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(Path, "replace", replace)
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("new")
    if failures == 3:
        with pytest.raises(PermissionError):
            replace_file(tmp_path / "b", tmp_path / "a")
    else:
        replace_file(tmp_path / "b", tmp_path / "a")
    assert (tmp_path / "a").read_text() == ("old" if failures == 3 else "new")
