"""A folder of checkpoints in which a half-written one is never taken for a whole one."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import attrs
import torch

from diptych.engine.errors import CheckpointError
from diptych.handlers.checkpoint_entries import Entry, added, entry_from

MANIFEST = "manifest.json"
SUFFIX = ".pt"
UNFINISHED = ".unfinished"
UNLISTED = ".unlisted"
"""Ends the name of an empty file beside a checkpoint that is about to enter the manifest, or has
just left it: where a kill leaves both, the checkpoint is swept away."""


class CheckpointStore:
    """Writes, reads and removes the checkpoints of one run.

    A file is written under another name, flushed to the disk, read back and compared with what was
    written, renamed, and only then entered in the manifest, which is replaced in one step. What
    the manifest does not list does not count. A process that is killed at any instant leaves the
    earlier checkpoints as they were.

    Args:
        directory: made at the first write.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def entries(self) -> list[Entry]:
        """Return the complete checkpoints in the order in which they were saved.

        Raises:
            CheckpointError: if the manifest cannot be read.
        """
        path = self.directory / MANIFEST
        try:
            return [entry_from(listed) for listed in json.loads(path.read_text())["checkpoints"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is no manifest of checkpoints ({error}): move it away, and resume from "
                "the path of a checkpoint"
            ) from error

    def write(self, entry: Entry, state: Mapping[str, Any]) -> Entry:
        """Write a checkpoint and enter it in the manifest; one of the same name is replaced.

        Returns:
            The entry, with size and digest.

        Raises:
            CheckpointError: if it cannot be written; the checkpoints before it stand.
        """
        path = self.directory / entry.file
        unfinished = path.with_name(entry.file + UNFINISHED)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            size, crc32 = _write_checked(unfinished, state)
            entry = attrs.evolve(entry, size=size, crc32=crc32)
            self._mark(path).touch()
            unfinished.replace(path)
            self._write_manifest(added(self.entries(), entry))
            self._mark(path).unlink()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            unfinished.unlink(missing_ok=True)
            self._remove_unlisted()
            raise CheckpointError(f"checkpoint {path} could not be written: {error}") from error
        return entry

    def read(self, name: str) -> dict[str, Any]:
        """Return the state in a checkpoint, on the CPU.

        Raises:
            CheckpointError: if the file is missing, is not what was written, or is no checkpoint.
        """
        path = self.directory / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {path} does not exist")
        listed = {entry.file: (entry.size, entry.crc32) for entry in self.entries()}
        try:
            damaged = name in listed and _size_and_crc32(path) != listed[name]
            state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, zipfile and pickle each have errors of their own
            raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
        if damaged:
            raise CheckpointError(f"checkpoint {path} is damaged: it is not what was written")
        if not isinstance(state, dict) or "format" not in state:
            raise CheckpointError(f"{path} is no checkpoint of a run")
        return state

    def remove(self, names: set[str]) -> None:
        """Remove checkpoints: first from the manifest, which never lists a missing file.

        Raises:
            CheckpointError: if the folder cannot be written.
        """
        if not names:
            return
        try:
            for name in names:
                self._mark(self.directory / name).touch()
            self._write_manifest([e for e in self.entries() if e.file not in names])
            self._remove_unlisted()
        except OSError as error:
            raise CheckpointError(f"{self.directory} could not be tidied: {error}") from error

    def sweep(self) -> None:
        """Remove what a killed process left half done.

        A file that merely lies in the folder, put there by somebody, stays.

        Raises:
            CheckpointError: if the manifest cannot be read.
        """
        for path in self.directory.glob("*" + UNFINISHED):
            path.unlink(missing_ok=True)
        self._remove_unlisted()

    def strangers(self) -> list[Path]:
        """Return the files that have the name of a checkpoint and that the manifest lacks."""
        listed = {entry.file for entry in self.entries()}
        files = self.directory.glob(f"checkpoint_*{SUFFIX}")
        return sorted(path for path in files if path.name not in listed)

    def _mark(self, path: Path) -> Path:
        return path.with_name(path.name + UNLISTED)

    def _remove_unlisted(self) -> None:
        """Remove the files that are marked and that the manifest does not list; then the marks."""
        marks = list(self.directory.glob("*" + UNLISTED))
        listed = {entry.file for entry in self.entries()} if marks else set()
        for mark in marks:
            path = mark.with_name(mark.name.removesuffix(UNLISTED))
            if path.name not in listed:
                path.unlink(missing_ok=True)
            mark.unlink(missing_ok=True)

    def _write_manifest(self, entries: list[Entry]) -> None:
        path = self.directory / MANIFEST
        unfinished = path.with_name(MANIFEST + UNFINISHED)
        text = json.dumps({"checkpoints": [attrs.asdict(entry) for entry in entries]}, indent=1)
        with unfinished.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _flush_directory(self.directory)


class _Summed:
    """A file that adds up the checksum of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = self.crc32 = 0

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        written = self._file.write(data)
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()


def _write_checked(path: Path, state: Mapping[str, Any]) -> tuple[int, int]:
    """Write a state, flush it to the disk and read it back; return its size and checksum."""
    with path.open("wb") as file:
        summed = _Summed(file)
        torch.save(dict(state), cast(BinaryIO, summed))
        file.flush()
        os.fsync(file.fileno())
    if _size_and_crc32(path) != (summed.size, summed.crc32):
        raise OSError("what was written does not read back")
    return summed.size, summed.crc32


def _flush_directory(directory: Path) -> None:
    # A rename is on the disk only when its directory is.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size_and_crc32(path: Path) -> tuple[int, int]:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return path.stat().st_size, value
