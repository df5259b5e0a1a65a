"""A folder of checkpoints in which a half-written one is never taken for a whole one."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import attrs
import torch
from torch import Tensor

from diptych.engine.errors import CheckpointError
from diptych.handlers.checkpointing.entries import AGAIN, Entry, added, entry_from
from diptych.handlers.checkpointing.file_digest import size_and_crc32
from diptych.handlers.checkpointing.sharded_files import check_shares, put_back, read_shares

MANIFEST = "manifest.json"
SUFFIX = ".pt"
SHARDS = ".shards"
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

    What is sharded stands in a folder beside the file, which says what is in it: size and checksum
    of each file, and where each tensor is. The folder has its name before the file is written.

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

        That one stands until then: the new file has another name, one of two.

        Returns:
            The entry, with its file's name, size and digest.

        Raises:
            CheckpointError: if it cannot be written; the checkpoints before it stand.
        """
        before = self.entries()
        replaced = next((other for other in before if other.name == entry.name), None)
        if replaced is not None and replaced.file == entry.file:
            entry = attrs.evolve(entry, file=entry.file.removesuffix(SUFFIX) + AGAIN)
        path = self.directory / entry.file
        unfinished = path.with_name(entry.file + UNFINISHED)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._take_folder(entry.shards, replaced)
            size, crc32 = _write_checked(unfinished, state)
            entry = attrs.evolve(entry, size=size, crc32=crc32)
            self._mark(path).touch()
            unfinished.replace(path)
            self._write_manifest(added(before, entry))
            self._remove_unlisted()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            unfinished.unlink(missing_ok=True)
            self.discard(entry.shards)
            self._remove_unlisted()
            raise CheckpointError(f"checkpoint {path} could not be written: {error}") from error
        return entry

    def new_folder(self, entry: Entry) -> str:
        """Return the name of the folder that an entry's shards are to get.

        They are written into `unfinished` of it. A checkpoint of the same name keeps its own until
        it is replaced.

        Raises:
            CheckpointError: if the directory cannot be written.
        """
        first = entry.file.removesuffix(SUFFIX) + SHARDS
        names = itertools.chain([first], (f"{first}_{number}" for number in itertools.count(2)))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            name = next(name for name in names if not (self.directory / name).exists())
            _delete(self.unfinished(name))
        except OSError as error:
            raise CheckpointError(f"{self.directory} could not be written: {error}") from error
        return name

    def unfinished(self, name: str) -> Path:
        """Return where a folder of shards is written, before it has its name."""
        return self.directory / (name + UNFINISHED)

    def discard(self, name: str) -> None:
        """Remove what was written of a folder of shards that does not have its name yet."""
        if name:
            shutil.rmtree(self.unfinished(name), ignore_errors=True)

    def _take_folder(self, shards: str, replaced: Entry | None) -> None:
        """Give a new folder of shards its name; what belongs to the replaced checkpoint goes."""
        for name in ({shards} - {""}).union(replaced.names if replaced else ()):
            self._mark(self.directory / name).touch()
        if shards:
            _flush_directory(self.unfinished(shards))
            self.unfinished(shards).replace(self.directory / shards)

    def read(self, name: str, shares: Any = None) -> dict[str, Any]:
        """Return the state in a checkpoint, on the CPU.

        Args:
            name: of the file.
            shares: the group of the ranks, where each is to get its share of what is sharded; None:
                all of it.

        Raises:
            CheckpointError: if the file is missing, is not what was written, or is no checkpoint.
        """
        state = self._read_file(name)
        return self._joined(name, state, state.get("shards", {}).get("tensors", {}), shares)

    def read_weights(self, name: str) -> dict[str, Tensor]:
        """Return the whole weights and buffers of the model in a checkpoint, on the CPU.

        Raises:
            CheckpointError: as `read`.
        """
        state = self._read_file(name)
        tensors = state.get("shards", {}).get("tensors", {})
        own = {path: where for path, where in tensors.items() if path.startswith("model.")}
        weights: dict[str, Tensor] = self._joined(name, state, own, None)["model"]
        return weights

    def _joined(
        self, name: str, state: dict[str, Any], tensors: Mapping[str, Any], shares: Any
    ) -> dict[str, Any]:
        """Return a state with its sharded tensors in it."""
        held = state.pop("shards", None)
        if held is None:
            return state
        folder = self.directory / held["folder"]
        check_shares(folder, held["files"], shares)
        try:
            joined: dict[str, Any] = put_back(state, read_shares(folder, tensors, shares))
        except Exception as error:  # torch and the file system each have errors of their own
            raise CheckpointError(f"checkpoint {self.directory / name}: {error}") from error
        return joined

    def _read_file(self, name: str) -> dict[str, Any]:
        # A checkpoint may have been written anew, under the other one of its file's names.
        entries = self.entries()
        name = next((entry.file for entry in entries if entry.name == name), name)
        path = self.directory / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {path} does not exist")
        listed = {entry.file: (entry.size, entry.crc32) for entry in entries}
        try:
            damaged = name in listed and size_and_crc32(path) != listed[name]
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
            entries = self.entries()
            for name in names.union(*(entry.names for entry in entries if entry.file in names)):
                self._mark(self.directory / name).touch()
            self._write_manifest([entry for entry in entries if entry.file not in names])
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
            _delete(path)
        self._remove_unlisted()

    def strangers(self) -> list[Path]:
        """Return the files that have the name of a checkpoint and that the manifest lacks."""
        listed = {entry.file for entry in self.entries()}
        files = self.directory.glob(f"checkpoint_*{SUFFIX}")
        return sorted(path for path in files if path.name not in listed)

    def _mark(self, path: Path) -> Path:
        return path.with_name(path.name + UNLISTED)

    def _remove_unlisted(self) -> None:
        """Remove what is marked and what the manifest does not list; then the marks."""
        marks = list(self.directory.glob("*" + UNLISTED))
        listed = set[str]().union(*(e.names for e in self.entries())) if marks else set()
        for mark in marks:
            path = mark.with_name(mark.name.removesuffix(UNLISTED))
            if path.name not in listed:
                _delete(path)
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
    if size_and_crc32(path) != (summed.size, summed.crc32):
        raise OSError("what was written does not read back")
    return summed.size, summed.crc32


def _flush_directory(directory: Path) -> None:
    # A rename is on the disk only when its directory is.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Remove a file or a folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
