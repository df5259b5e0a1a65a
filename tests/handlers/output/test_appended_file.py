"""A file of chunks: each is in it whole, in order, or waits, whatever the disk does."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from io import FileIO
from pathlib import Path

import pytest

from diptych.handlers.output import appended_file
from diptych.handlers.output.appended_file import AppendedFile
from tests.handlers.output.outage import no_room

LINES = [f"line {number}\n".encode() for number in range(9)]


def written(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


@pytest.fixture
def opened() -> Iterator[Callable[[Path], AppendedFile]]:
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(closing(AppendedFile(path)))


def test_chunks_are_in_the_file_when_append_returns(tmp_path, opened):
    file = opened(tmp_path / "made" / "log")

    for count, line in enumerate(LINES, 1):
        file.append(line)
        assert written(file.path) == LINES[:count]


@pytest.mark.parametrize("room", [0, 3, 7, 8, 13])
def test_a_chunk_without_room_leaves_no_part_and_is_written_later_in_order(tmp_path, opened, room):
    file = opened(tmp_path / "log")
    fits = room // len(LINES[0])
    with no_room(room):
        for line in LINES[:fits]:
            file.append(line)
        for line in LINES[fits:4]:
            with pytest.raises(OSError, match="too large"):
                file.append(line)
            assert written(file.path) == LINES[:fits]
        assert file.waiting == LINES[fits:4]

    file.append(LINES[4])

    assert written(file.path) == LINES[:5]
    assert file.unwritten == 0


class Stingy(FileIO):
    """A file that takes a few bytes at a time."""

    def write(self, data: object) -> int:
        return super().write(bytes(data)[:3])  # type: ignore[call-overload]


def test_a_write_that_takes_a_part_is_completed(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(appended_file, "FileIO", Stingy)
    file = opened(tmp_path / "log")

    for line in LINES:
        file.append(line)

    assert written(file.path) == LINES


class Faulty(FileIO):
    """A file whose operations fail when a generator of random numbers says so."""

    chance = random.Random(0)
    rate = 0.0

    def _may_fail(self) -> None:
        if self.chance.random() < self.rate:
            raise OSError(errno.EIO, "Input/output error")

    def write(self, data: object) -> int:
        self._may_fail()
        taken = bytes(data)[: self.chance.randint(1, 12)]  # type: ignore[call-overload]
        return super().write(taken)

    def truncate(self, size: int | None = None) -> int:
        self._may_fail()
        return super().truncate(size)

    def close(self) -> None:
        super().close()
        self._may_fail()


@pytest.mark.parametrize("seed", range(30))
def test_whatever_fails_and_whenever_every_chunk_is_in_the_file_at_last(
    tmp_path, monkeypatch, seed
):
    monkeypatch.setattr(appended_file, "FileIO", Faulty)
    monkeypatch.setattr(Faulty, "chance", random.Random(seed))
    monkeypatch.setattr(Faulty, "rate", 0.3)
    told: list[bytes] = []
    file, failures = AppendedFile(tmp_path / "log", written=told.append), 0
    for line in LINES:
        with suppress(OSError):
            file.append(line)
            continue
        failures += 1
    monkeypatch.setattr(Faulty, "rate", 0.0)
    file.close()

    assert written(file.path) == told == LINES
    assert failures
    assert not file.is_open


def test_an_interrupt_in_the_middle_of_a_write_leaves_no_part(tmp_path, monkeypatch):
    class Interrupted(FileIO):
        def write(self, data: object) -> int:
            super().write(bytes(data)[:3])  # type: ignore[call-overload]
            raise KeyboardInterrupt

    file = AppendedFile(tmp_path / "log")
    file.append(LINES[0])
    file.close()
    monkeypatch.setattr(appended_file, "FileIO", Interrupted)

    with pytest.raises(KeyboardInterrupt):
        file.append(LINES[1])

    assert written(file.path) == LINES[:1]


def test_a_file_that_somebody_removed_begins_anew(tmp_path, opened):
    file = opened(tmp_path / "log")
    file.append(LINES[0])
    with no_room(12), pytest.raises(OSError, match="too large"):
        file.append(LINES[1])
    file.path.unlink()

    file.append(LINES[2])

    assert written(file.path) == LINES[1:3]


def test_the_memory_for_waiting_chunks_is_bounded_and_keeps_the_first_and_the_last(
    tmp_path, opened, monkeypatch
):
    monkeypatch.setattr(appended_file, "MOST_WAITING", 5 * len(LINES[0]))
    file = opened(tmp_path / "log")
    with no_room():
        for line in LINES:
            with pytest.raises(OSError, match="too large"):
                file.append(line)

    assert (len(file.waiting), file.dropped, file.unwritten) == (5, 4, 9)
    file.flush()
    kept = written(file.path)
    assert (kept[:2], kept[-2:]) == (LINES[:2], LINES[-2:])
    assert file.unwritten == 4


def test_a_symbolic_link_is_not_followed_and_its_target_stays(tmp_path, opened):
    target, path = tmp_path / "precious", tmp_path / "log"
    target.write_text("precious")
    path.symlink_to(target)
    file = opened(path)

    with pytest.raises(OSError, match="it is a symbolic link; remove it"):
        file.cut(0)
    with pytest.raises(OSError, match="it is a symbolic link; remove it"):
        file.append(LINES[0])
    assert target.read_text() == "precious"

    path.unlink()
    file.append(LINES[1])
    assert written(path) == LINES[:2]


def test_a_cut_removes_the_end_and_never_lengthens(tmp_path, opened):
    path = tmp_path / "log"
    path.write_bytes(b"".join(LINES))

    file = opened(path)
    file.cut(2 * len(LINES[0]))
    assert written(path) == LINES[:2]
    file.cut(10_000)
    file.append(LINES[5])

    assert written(path) == [*LINES[:2], LINES[5]]


def test_a_pipe_of_the_files_name_is_an_error_and_nobody_is_waited_for(tmp_path, opened):
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError, match="it is a pipe; remove it"):
        opened(tmp_path / "log").append(LINES[0])
    (tmp_path / "log").unlink()
