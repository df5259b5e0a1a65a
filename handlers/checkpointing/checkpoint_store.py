"""Crash-safe storage of checkpoints: the manifest lists complete files only."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from diptych.engine.errors import CheckpointError, checkpoint_errors
from diptych.engine.state.checkpoint_structure import (
    check_archive,
    check_parts,
    load_plain,
    outline_of,
    outline_of_parts,
)
from diptych.handlers.checkpointing.entries import (
    FILE,
    FOLDER,
    SHARDS,
    SUFFIX,
    Entry,
    with_entry,
)
from diptych.handlers.checkpointing.export import EVALUATED, weights_in
from diptych.handlers.checkpointing.manifest import (
    MANIFEST,
    Manifest,
    read_manifest,
    restore_manifest,
    write_manifest,
)
from diptych.handlers.checkpointing.sharded_tensors import (
    RANK_FILE,
    check_index,
    check_shard_files,
    insert_tensors,
    read_shards,
)
from diptych.handlers.contained_paths import contained_path, is_link
from diptych.handlers.files import UNFINISHED, flush_folder, write_atomically
from diptych.handlers.run_directory import WEIGHTS
from diptych.handlers.verified_files import (
    is_intact,
    remove_file,
    remove_folder,
    write_verified,
)

logger = logging.getLogger(__name__)

UNLISTED = ".unlisted"
"""The suffix of an empty file, the mark, beside a file or folder that is about to enter the
manifest or has just left it. After a kill, a marked one that is not in the manifest is removed."""
DESCRIPTION = ("epoch", "iteration", "metrics", "score", "scored_by")
"""The fields of an entry that its file holds too, to tell whether a changed manifest is right."""


class CheckpointStore:
    """Writes, reads and removes the checkpoints of one run.

    A file is written under a temporary name, flushed to the disk, read back, compared with what was
    written, renamed, and only then listed in the manifest, which is replaced atomically. A file
    that the manifest does not list does not count. A process that is killed at any instant leaves
    the earlier checkpoints intact.

    Sharded tensors are in a folder beside the file. The file lists size and checksum of each file
    in the folder, and the position of each tensor. The folder is complete before the file is
    written. The first write makes the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._has_warned = False

    def entries(self) -> list[Entry]:
        """Return the complete checkpoints in the order in which they were saved.

        Raises:
            CheckpointError: if the manifest cannot be read.
        """
        return self._manifest().entries

    def _manifest(self) -> Manifest:
        manifest = read_manifest(self.directory)
        if not self._has_warned and manifest.path.name != MANIFEST:
            self._warn("%s is lost or damaged. %s replaces it.", MANIFEST, manifest.path.name)
        elif not self._has_warned and not manifest.as_written:
            self._warn("%s has been changed since it was written.", MANIFEST)
        return manifest

    def _warn(self, message: str, name: str, *others: str) -> None:
        logger.warning(message, self.directory / name, *others)
        self._has_warned = True

    def write(self, entry: Entry, state: Mapping[str, Any]) -> Entry:
        """Write a checkpoint and list it in the manifest; replace one of the same name.

        The replaced checkpoint stays intact until then, since the two files have different names.

        Returns:
            The entry with the file's actual name, size and checksum.

        Raises:
            CheckpointError: if the checkpoint cannot be written; earlier checkpoints stay intact.
        """
        if not FILE.fullmatch(entry.file):
            raise CheckpointError(
                f"epoch must be a whole number of at most 20 digits, got the file {entry.file:.300}"
            )
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
                flush_folder(self.directory / entry.shards, of=self.directory)
            described = {name: getattr(entry, name) for name in DESCRIPTION}
            described["optimizer"] = outline_of(state["optimizer"])
            described["parts"] = outline_of_parts(state)
            state = {**state, "entry": described}
            digests: list[tuple[int, int]] = []

            def write_and_mark(temporary: Path) -> None:
                digests.append(write_verified(temporary, partial(torch.save, state)))
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

    def next_name(self, name: str) -> str:
        """Return the name of the file to which a checkpoint of a plain name is written next."""
        entry = next((entry for entry in self.entries() if entry.name == name), None)
        return entry.renamed().file if entry is not None and entry.file == name else name

    def new_folder(self, entry: Entry) -> str:
        """Return a free name for the folder of an entry's shards, marked as not listed yet.

        An earlier checkpoint of the same name keeps its folder until it is replaced.

        Raises:
            CheckpointError: if the directory cannot be written.
        """
        first = entry.file.removesuffix(SUFFIX) + SHARDS
        names = itertools.chain([first], (f"{first}_{number}" for number in itertools.count(2)))
        with checkpoint_errors(f"{self.directory} could not be written"):
            self.directory.mkdir(parents=True, exist_ok=True)
            name = next(name for name in names if not os.path.lexists(self.directory / name))
            self._mark(name)
        return name

    def read(self, name: str, group: Any = None) -> dict[str, Any]:
        """Return the state in a checkpoint, on the CPU.

        With a process group of all ranks, each gets its shards of sharded tensors; else all are
        whole.

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
        parts = ("model.", f"{EVALUATED}.")
        of_model = {path: stored for path, stored in index.items() if path.startswith(parts)}
        return weights_in(self._with_tensors(name, state, of_model, None))

    def _with_tensors(
        self, name: str, state: dict[str, Any], index: Mapping[str, Any], group: Any
    ) -> dict[str, Any]:
        """Return a state with the sharded tensors of an index instead of their placeholders."""
        stored = state.pop("shards", None)
        # Torch and the file system each have errors of their own.
        with checkpoint_errors(f"checkpoint {self.directory / name} cannot be read", Exception):
            check_index(state, stored)
            if stored is not None:
                folder = contained_path(self.directory, stored["folder"], FOLDER)
                check_shard_files(folder, stored["files"], group)
                state = insert_tensors(state, read_shards(folder, index, group))
        return state

    def _read_file(self, name: str) -> dict[str, Any]:
        # The file has another name if the checkpoint was written again.
        entries = self.entries()
        name = next((entry.file for entry in entries if entry.name == name), name)
        listed = next((entry for entry in entries if entry.file == name), None)
        path = self.directory / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {path} does not exist")
        if listed is not None:
            self._check_file(listed)
        # Torch, zipfile and pickle each have errors of their own.
        with checkpoint_errors(f"checkpoint {path} cannot be read", Exception):
            check_archive(path, path.stat().st_size)
            state = load_plain(path)
        if not isinstance(state, dict) or "format" not in state:
            raise CheckpointError(
                f"{path} is not a checkpoint of a run. For weights alone there is "
                "load_weights(model, path)"
            )
        # A value of another type may raise anything.
        with checkpoint_errors(f"checkpoint {path} cannot be used", Exception):
            check_parts(state)
        return state

    def _check_file(self, entry: Entry) -> None:
        """Check that the file of a listed checkpoint is as it was written, and no link."""
        path = self.directory / entry.file
        with checkpoint_errors(f"checkpoint {path} cannot be read", OSError, ValueError):
            contained_path(self.directory, entry.file, FILE)
            intact = is_intact(path, entry.size, entry.crc32)
        if not intact:
            raise CheckpointError(
                f"checkpoint {path} is damaged: its content differs from what was written"
            )

    def is_intact(self, entry: Entry) -> bool:
        """Return whether the file of a checkpoint is as it was written."""
        try:
            self._check_file(entry)
        except CheckpointError:
            return False
        return True

    def remove(self, files: set[str]) -> None:
        """Remove checkpoints, first from the manifest, so that it never lists a missing file.

        Raises:
            CheckpointError: if the directory cannot be written.
        """
        if not files:
            return
        with checkpoint_errors(f"old checkpoints in {self.directory} could not be removed"):
            entries = self.entries()
            for name in files.union(*(entry.names for entry in entries if entry.file in files)):
                self._mark(name)
            self._write_manifest([entry for entry in entries if entry.file not in files])
            self._remove_unlisted()

    def revise(self, revised: Callable[[Entry], Entry]) -> None:
        """Replace each entry of the manifest by another; write it only if one differs.

        Raises:
            CheckpointError: if the directory cannot be read or written.
        """
        entries = self.entries()
        after = [revised(entry) for entry in entries]
        if after != entries:
            with checkpoint_errors(f"the manifest of {self.directory} could not be written"):
                self._write_manifest(after)

    def sweep(self) -> None:
        """Remove the incomplete files of a killed process, and restore a lost manifest.

        Other files in the directory, such as a copy that a user made, stay.

        Raises:
            CheckpointError: if the manifest cannot be read, or the directory cannot be written.
        """
        way_out = ". Make it writable, or use another directory."
        with checkpoint_errors(f"{self.directory} could not be tidied", way_out=way_out):
            manifest = self._manifest()
            restore_manifest(self.directory)
            if not manifest.as_written:
                self._write_manifest(list(self._confirmed(manifest.entries)))
            self._remove_unfinished()
            self._remove_unlisted()
        for path in self.unlisted():
            if FILE.fullmatch(path.name) and manifest.entries:
                logger.warning("%s is not in %s, and is ignored.", path, MANIFEST)

    def _remove_unfinished(self) -> None:
        for path in self.directory.glob("*" + UNFINISHED):
            name = path.name.removesuffix(UNFINISHED)
            if FILE.fullmatch(name) or name in {MANIFEST, WEIGHTS}:
                remove_file(path)

    def _confirmed(self, entries: list[Entry]) -> Iterator[Entry]:
        """Yield the entries whose files can be read, as the files describe themselves."""
        for entry in entries:
            try:
                described = self._read_file(entry.file).get("entry", {})
            except CheckpointError as error:
                logger.warning("%s. It is taken out of %s.", error, MANIFEST)
                continue
            yield attrs.evolve(entry, **{k: v for k, v in described.items() if k in DESCRIPTION})

    def unlisted(self) -> list[Path]:
        """Return the files that are named like a checkpoint and missing from the manifest."""
        listed = {entry.file for entry in self.entries()}
        files = self.directory.glob(f"checkpoint_*{SUFFIX}")
        return sorted(path for path in files if path.name not in listed)

    def _mark(self, name: str) -> None:
        mark = self.directory / (name + UNLISTED)
        if is_link(mark):
            raise OSError(f"{mark} is a symbolic link")
        mark.touch()

    def _remove_unlisted(self) -> None:
        """Remove marked files and folders that the manifest does not list, and their marks.

        The mark must be an empty file, and the name one that a checkpoint or its folder gets.
        """
        marks = list(self.directory.glob("*" + UNLISTED))
        listed = set[str]().union(*(e.names for e in self.entries())) if marks else set()
        for mark in marks:
            name = mark.name.removesuffix(UNLISTED)
            path = self.directory / name
            if not (FILE.fullmatch(name) or FOLDER.fullmatch(name)) or is_link(mark):
                continue
            if name not in listed:
                remove_file(path) if FILE.fullmatch(name) else remove_folder(path, RANK_FILE)
            remove_file(mark)

    def _write_manifest(self, entries: list[Entry]) -> None:
        write_manifest(self.directory, entries)
        flush_folder(self.directory)
