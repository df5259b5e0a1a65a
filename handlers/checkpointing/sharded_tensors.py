"""Sharded tensors of a run's state: each rank writes its shards; any number of ranks reads them.

A shard is a block of consecutive rows. The file of a rank holds its shards one after another, each
as `torch.save` writes it; an index of plain values holds their positions.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.dtensor import is_sharded, local_part, own_rows
from diptych.engine.errors import CheckpointError, checkpoint_errors
from diptych.engine.name_patterns import listed
from diptych.engine.state.checkpoint_structure import check_archive
from diptych.handlers.contained_paths import check_name, contained_path
from diptych.handlers.verified_files import is_intact, write_verified

PLACEHOLDER = "diptych.shard"
"""The key of the mapping that replaces a sharded tensor in a state; its value is the path."""

RANK_FILE = re.compile(r"rank_[0-9]{1,9}\.tensors|__[0-9]{1,9}_[0-9]{1,9}\.distcp")
"""The names of the files in a folder of shards; earlier versions wrote the second kind."""

LocalShards = dict[str, tuple[Tensor, tuple[int, ...]]]
"""The shard of this rank and the shape of the whole tensor, by the tensor's path in the state."""


def extract_shards(state: Any) -> tuple[Any, LocalShards]:
    """Return a state with placeholders instead of sharded tensors, and this rank's shards.

    Raises:
        CheckpointError: if a tensor is sharded along another dimension than the first.
    """
    shards: LocalShards = {}

    def extract(path: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_sharded(value):
            return value
        _check_layout(path, value)
        shards[path] = local_part(value.detach()), tuple(value.shape)
        return {PLACEHOLDER: path}

    return _mapped(state, extract), shards


def insert_tensors(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return a state with tensors instead of their placeholders; other placeholders stay."""
    if isinstance(state, dict) and state.keys() == {PLACEHOLDER}:
        return tensors.get(state[PLACEHOLDER], state)
    if isinstance(state, dict):
        return {key: insert_tensors(value, tensors) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(insert_tensors(value, tensors) for value in state)
    return state


def _mapped(value: Any, function: Callable[[str, Any], Any], path: str = "") -> Any:
    if isinstance(value, Mapping):
        return {k: _mapped(v, function, f"{path}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(v, function, f"{path}.{i}") for i, v in enumerate(value))
    return function(path, value)


def _check_layout(path: str, tensor: Any) -> None:
    placements = tensor.placements
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise CheckpointError(
            f"a tensor must be sharded along its first dimension to be saved, got {path} with "
            f"{placements}. Use an optimizer whose state has the shape of the parameters."
        )


def write_shards(folder: Path, shards: LocalShards, group: Any) -> dict[str, Any]:
    """Write every rank's shards into a folder; all ranks call it.

    The shards, on any device, are of the same tensors on all ranks. Nothing else uses the group
    meanwhile.

    Returns:
        On rank 0, `tensors`, the index, and `files`, the size and checksum of each file; {} on
        other ranks.

    Raises:
        CheckpointError: on all ranks, if a rank cannot write.
    """
    file, chunks = f"rank_{rank()}.tensors", dict[str, list[Any]]()
    own: Any
    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = write_verified(folder / file, partial(_write_chunks, shards, file, chunks))
        own = file, list(digest), chunks
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        own = f"rank {rank()}: {type(error).__name__}: {error}"
    written: list[Any] = [None] * world_size()
    dist.all_gather_object(written, own, group=group)
    failures = [message for message in written if isinstance(message, str)]
    if failures:
        raise CheckpointError(f"shards {folder} could not be written: {'; '.join(failures)}")
    if rank() != 0:
        return {}
    index: dict[str, Any] = {
        path: {
            "shape": list(shape),
            "dtype": part.dtype,
            "chunks": [of_rank[path] for _, _, of_rank in written if path in of_rank],
        }
        for path, (part, shape) in shards.items()
    }
    return {"tensors": index, "files": {name: digest for name, digest, _ in written}}


def _write_chunks(shards: LocalShards, name: str, chunks: dict[str, list[Any]], file: Any) -> None:
    """Write shards to a `ChecksummedFile`; note offsets, sizes, file, start and length of each."""
    for path, (part, shape) in shards.items():
        if not len(part):  # a rank may hold no row of a small tensor
            continue
        start, stored = file.size, part.cpu()
        # `torch.save` writes the whole storage that a view is part of.
        is_view = stored.untyped_storage().nbytes() != stored.numel() * stored.element_size()
        torch.save(stored.clone() if is_view else stored, file)
        offsets = [_rows_of_this_rank(shape).start, *[0] * (len(shape) - 1)]
        chunks[path] = [offsets, list(part.shape), name, start, file.size - start]


def _rows_of_this_rank(shape: Any) -> range:
    own = own_rows(torch.arange(shape[0]))
    first = int(own[0]) if len(own) else 0
    return range(first, first + len(own))


def check_index(state: Any, stored: Mapping[str, Any] | None) -> None:
    """Check the index of sharded tensors that a checkpoint holds, before a file is opened.

    Without an index, no tensor is sharded.

    Raises:
        CheckpointError: if it lacks a tensor or rows of one, or names another file.
    """
    index, files = (stored["tensors"], stored["files"]) if stored is not None else ({}, {})
    lacking = sorted(set(_placeholders(state)) - set(index))
    if lacking:
        raise CheckpointError(f"it lacks the shards of {listed(lacking)}")
    for name in files:
        check_name(name, RANK_FILE)
    for path, tensor in index.items():
        _check_tensor(path, tensor, files)


def _placeholders(state: Any) -> Iterator[str]:
    if isinstance(state, Mapping) and state.keys() == {PLACEHOLDER}:
        yield state[PLACEHOLDER]
    elif isinstance(state, (Mapping, list, tuple)):
        for item in state.values() if isinstance(state, Mapping) else state:
            yield from _placeholders(item)


def _check_tensor(path: str, tensor: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Check that the chunks of a tensor are in the files and cover its rows once."""
    row = 0
    try:
        length, *rest = tensor["shape"]
        for chunk in sorted(tensor["chunks"]):
            row += _checked_rows(chunk, row, rest, tensor["dtype"].itemsize, files)
        if row != length:
            raise ValueError(f"{row} of {length} rows are there")  # noqa: TRY301
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"the shards of {path} are not all there: {error!r}") from error


def _checked_rows(
    chunk: Any, row: int, rest: list[int], itemsize: int, files: Mapping[str, Any]
) -> int:
    """Return the number of rows in a chunk that must begin at a row, once it is checked."""
    offsets, counts, file, start, size = chunk
    if offsets != [row, *[0] * len(rest)] or counts[1:] != rest or min(counts) < 0 or not counts[0]:
        raise ValueError(f"its rows {offsets}, {counts} of them, must begin at row {row}")
    if not 0 <= start <= start + size <= files[file][0]:
        raise ValueError(f"{file} has no bytes {start} to {start + size}")
    if math.prod(counts) * itemsize > size:
        raise ValueError(f"{math.prod(counts)} values do not fit into {size} bytes")
    return int(counts[0])


def check_shard_files(folder: Path, files: Mapping[str, list[int]], group: Any) -> None:
    """Check the files of a folder against their sizes and checksums.

    With a group, each rank checks only a part of them.

    Raises:
        CheckpointError: naming a file that is missing or damaged.
    """
    own = sorted(files)[rank() :: world_size()] if group is not None else sorted(files)
    for name in own:
        path = contained_path(folder, name, RANK_FILE)
        with checkpoint_errors(f"{path} cannot be read"):
            intact = is_intact(path, *files[name])
        if not intact:
            raise CheckpointError(f"{path} is damaged: its content differs from what was written")


def read_shards(
    folder: Path, index: Mapping[str, Mapping[str, Any]], group: Any
) -> dict[str, Tensor]:
    """Return tensors that any number of ranks wrote, on the CPU, by their paths in the state.

    With a process group of all ranks, they are sharded over it; else they are whole.
    """
    mesh = None if group is None else _host_mesh(group)
    found = {}
    for path, stored in index.items():
        shape = stored["shape"]
        rows = range(shape[0]) if mesh is None else _rows_of_this_rank(shape)
        part = torch.empty([len(rows), *shape[1:]], dtype=stored["dtype"])
        for chunk in stored["chunks"]:
            _read_rows(folder, chunk, rows, part)
        found[path] = part if mesh is None else _as_sharded(part, shape, mesh)
    return found


def _read_rows(folder: Path, chunk: Any, rows: range, part: Tensor) -> None:
    """Copy the rows that a chunk holds into `part`, which has these `rows` of a tensor."""
    (first, *_), (count, *_), file, start, length = chunk
    low, high = max(first, rows.start), min(first + count, rows.stop)
    if low >= high:
        return
    with (folder / file).open("rb") as opened:
        opened.seek(start)
        content = io.BytesIO(opened.read(length))
    check_archive(content, length)
    content.seek(0)
    stored = torch.load(content, map_location="cpu", weights_only=True)
    is_as_listed = isinstance(stored, Tensor) and stored.dtype == part.dtype
    if not is_as_listed or list(stored.shape) != [count, *part.shape[1:]]:
        raise CheckpointError(f"{folder / file} holds another tensor at byte {start} than listed")
    part[low - rows.start : high - rows.start] = stored[low - first : high - first]


def _host_mesh(group: Any) -> Any:
    from torch.distributed.device_mesh import DeviceMesh  # noqa: PLC0415 - only sharded runs pay

    return DeviceMesh.from_group(group, "cpu")


def _as_sharded(part: Tensor, shape: Any, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415

    strides = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(0)], shape=torch.Size(shape), stride=strides)
