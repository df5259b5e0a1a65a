"""A folder of checkpoints in which a half-written one is never taken for a whole one."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from diptych.engine.errors import CheckpointError

MANIFEST = "manifest.json"
SUFFIX = ".pt"
UNFINISHED = ".unfinished"


@attrs.frozen(kw_only=True)
class Entry:
    """A checkpoint, as the manifest lists it.

    Attributes:
        file: its name in the folder.
        epoch: epochs that were started.
        iteration: updates that were made.
        metrics: the values that it was saved with.
        score: the value that it is ranked by, or None.
        resumable: whether a run can go on from it.
        by_hand: whether it was asked for, and so is never removed.
        size: bytes.
        crc32: of the file: enough to tell a damaged one.
    """

    file: str
    epoch: int
    iteration: int
    metrics: dict[str, float]
    score: float | None = None
    resumable: bool = True
    by_hand: bool = False
    size: int = 0
    crc32: int = 0


class CheckpointStore:
    """Writes, reads and removes the checkpoints of one run.

    A file is written under another name, flushed to the disk, renamed, read back, and only then
    entered in the manifest, which is replaced in one step. What the manifest does not list does
    not count. A process that is killed at any instant leaves the earlier checkpoints as they were.

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
            return [Entry(**entry) for entry in json.loads(path.read_text())["checkpoints"]]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no manifest of checkpoints: {error}") from error

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
            with unfinished.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            size, crc32 = unfinished.stat().st_size, _crc32(unfinished)
            entry = attrs.evolve(entry, size=size, crc32=crc32)
            unfinished.replace(path)
            others = [other for other in self.entries() if other.file != entry.file]
            self._write_manifest([*others, entry])
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            unfinished.unlink(missing_ok=True)
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
        listed = next((entry for entry in self.entries() if entry.file == name), None)
        if listed is not None and (path.stat().st_size, _crc32(path)) != (
            listed.size,
            listed.crc32,
        ):
            raise CheckpointError(f"checkpoint {path} is damaged: it is not what was written")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, zipfile and pickle each have errors of their own
            raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
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
            self._write_manifest([e for e in self.entries() if e.file not in names])
            for name in names:
                (self.directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.directory} could not be tidied: {error}") from error

    def sweep(self) -> list[str]:
        """Remove what a killed process left half done; return the names."""
        listed = {entry.file for entry in self.entries()}
        left = [
            path
            for path in self.directory.glob("*")
            if path.name.endswith(UNFINISHED)
            or (
                path.name.startswith("checkpoint_")
                and path.suffix == SUFFIX
                and path.name not in listed
            )
        ]
        for path in left:
            path.unlink(missing_ok=True)
        return sorted(path.name for path in left)

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


def _flush_directory(directory: Path) -> None:
    # A rename is on the disk only when its directory is.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value
