"""Crash-safe storage of checkpoints: the manifest lists complete files only."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from diptych.engine.errors import CheckpointError
from diptych.handlers.checkpointing.entries import SUFFIX, Entry, entry_from, with_entry
from diptych.handlers.checkpointing.sharded_tensors import (
    check_shard_files,
    insert_tensors,
    read_shards,
)
from diptych.handlers.checkpointing.verified_files import (
    delete_path,
    flush_folder,
    size_and_crc32,
    write_verified,
)
from diptych.handlers.files import UNFINISHED, write_atomically

MANIFEST = "manifest.json"
SHARDS = ".shards"
UNLISTED = ".unlisted"
"""The suffix of an empty file, the mark, beside a file or folder that is about to enter the
manifest or has just left it. After a kill, a marked one that is not in the manifest is removed."""


class CheckpointStore:
    """Writes, reads and removes the checkpoints of one run.

    A file is written under a temporary name, flushed to the disk, read back, compared with what was
    written, renamed, and only then listed in the manifest, which is replaced atomically. A file
    that the manifest does not list does not count. A process that is killed at any instant leaves
    the earlier checkpoints intact.

    Sharded tensors are in a folder beside the file. The file lists size and checksum of each file
    in the folder, and the position of each tensor. The folder is complete before the file is
    written.

    Args:
        directory: the folder; made by the first write.
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
                f"{path} is not a manifest of checkpoints: {error}. Move it away, and resume from "
                "the path of a checkpoint."
            ) from error

    def write(self, entry: Entry, state: Mapping[str, Any]) -> Entry:
        """Write a checkpoint and list it in the manifest; replace one of the same name.

        The replaced checkpoint stays intact until then, since the two files have different names.

        Returns:
            The entry with the file's actual name, size and checksum.

        Raises:
            CheckpointError: if the checkpoint cannot be written; earlier checkpoints stay intact.
        """
        before = self.entries()
        replaced = next((other for other in before if other.name == entry.name), None)
        if replaced is not None and replaced.file == entry.file:
            entry = entry.renamed()
        path = self.directory / entry.file
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name in replaced.names if replaced is not None else ():
                self._mark(name)
            if entry.shards:
                flush_folder(self.directory / entry.shards)
            digests: list[tuple[int, int]] = []

            def write_and_mark(temporary: Path) -> None:
                digests.append(write_verified(temporary, partial(torch.save, dict(state))))
                self._mark(entry.file)

            write_atomically(path, write_and_mark)
            size, crc32 = digests[0]
            entry = attrs.evolve(entry, size=size, crc32=crc32)
            # The file's rename must be durable before a manifest that lists it: after a power cut,
            # the disk may hold the later of two renames without the earlier one.
            flush_folder(self.directory)
            self._write_manifest(with_entry(before, entry))
            self._remove_unlisted()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            self._remove_unlisted()
            raise CheckpointError(f"checkpoint {path} could not be written: {error}") from error
        return entry

    def new_folder(self, entry: Entry) -> str:
        """Return a free name for the folder of an entry's shards, marked as not listed yet.

        An earlier checkpoint of the same name keeps its folder until it is replaced.

        Raises:
            CheckpointError: if the directory cannot be written.
        """
        first = entry.file.removesuffix(SUFFIX) + SHARDS
        names = itertools.chain([first], (f"{first}_{number}" for number in itertools.count(2)))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            name = next(name for name in names if not (self.directory / name).exists())
            self._mark(name)
        except OSError as error:
            raise CheckpointError(f"{self.directory} could not be written: {error}") from error
        return name

    def read(self, name: str, group: Any = None) -> dict[str, Any]:
        """Return the state in a checkpoint, on the CPU.

        Args:
            name: the name of the file.
            group: a process group of all ranks: each gets its shards of sharded tensors; None:
                whole tensors.

        Raises:
            CheckpointError: if the file is missing, damaged, or not a checkpoint.
        """
        state = self._read_file(name)
        index = state.get("shards", {}).get("tensors", {})
        return self._with_tensors(name, state, index, group)

    def read_weights(self, name: str) -> dict[str, Tensor]:
        """Return the whole weights and buffers of the model in a checkpoint, on the CPU.

        Raises:
            CheckpointError: as `read`.
        """
        state = self._read_file(name)
        index = state.get("shards", {}).get("tensors", {})
        of_model = {path: stored for path, stored in index.items() if path.startswith("model.")}
        weights: dict[str, Tensor] = self._with_tensors(name, state, of_model, None)["model"]
        return weights

    def _with_tensors(
        self, name: str, state: dict[str, Any], index: Mapping[str, Any], group: Any
    ) -> dict[str, Any]:
        """Return a state with the sharded tensors of an index instead of their placeholders."""
        stored = state.pop("shards", None)
        if stored is None:
            return state
        folder = self.directory / stored["folder"]
        check_shard_files(folder, stored["files"], group)
        try:
            whole: dict[str, Any] = insert_tensors(state, read_shards(folder, index, group))
        except Exception as error:  # torch and the file system each have errors of their own
            raise CheckpointError(
                f"checkpoint {self.directory / name} cannot be read: {error}"
            ) from error
        return whole

    def _read_file(self, name: str) -> dict[str, Any]:
        # The file has another name if the checkpoint was written again.
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
            raise CheckpointError(
                f"checkpoint {path} is damaged: its content differs from what was written"
            )
        if not isinstance(state, dict) or "format" not in state:
            raise CheckpointError(f"{path} is not a checkpoint of a run")
        return state

    def remove(self, files: set[str]) -> None:
        """Remove checkpoints, first from the manifest, so that it never lists a missing file.

        Raises:
            CheckpointError: if the directory cannot be written.
        """
        if not files:
            return
        try:
            entries = self.entries()
            for name in files.union(*(entry.names for entry in entries if entry.file in files)):
                self._mark(name)
            self._write_manifest([entry for entry in entries if entry.file not in files])
            self._remove_unlisted()
        except OSError as error:
            raise CheckpointError(
                f"old checkpoints in {self.directory} could not be removed: {error}"
            ) from error

    def sweep(self) -> None:
        """Remove the incomplete files of a killed process.

        Other files in the directory, such as a copy that a user made, stay.

        Raises:
            CheckpointError: if the manifest cannot be read.
        """
        for path in self.directory.glob("*" + UNFINISHED):
            delete_path(path)
        self._remove_unlisted()

    def unlisted(self) -> list[Path]:
        """Return the files that are named like a checkpoint and missing from the manifest."""
        listed = {entry.file for entry in self.entries()}
        files = self.directory.glob(f"checkpoint_*{SUFFIX}")
        return sorted(path for path in files if path.name not in listed)

    def _mark(self, name: str) -> None:
        (self.directory / (name + UNLISTED)).touch()

    def _remove_unlisted(self) -> None:
        """Remove marked files and folders that the manifest does not list, and all marks."""
        marks = list(self.directory.glob("*" + UNLISTED))
        listed = set[str]().union(*(e.names for e in self.entries())) if marks else set()
        for mark in marks:
            path = mark.with_name(mark.name.removesuffix(UNLISTED))
            if path.name not in listed:
                delete_path(path)
            mark.unlink(missing_ok=True)

    def _write_manifest(self, entries: list[Entry]) -> None:
        listed = {"checkpoints": [attrs.asdict(entry) for entry in entries]}
        write_atomically(self.directory / MANIFEST, json.dumps(listed, indent=1))
        flush_folder(self.directory)
