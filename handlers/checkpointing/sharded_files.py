"""What of a run is sharded: taken out of its state, written by all ranks, and put back."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.dtensor import is_sharded, local_part, own_rows
from diptych.engine.errors import CheckpointError
from diptych.handlers.checkpointing.file_digest import size_and_crc32

MARK = "diptych.shard"
"""The key of a mapping that stands in a state for the sharded tensor that it names."""


Shares = dict[str, tuple[Tensor, tuple[int, ...]]]
"""Of each sharded tensor, by its path in the state, what this rank holds, and the whole's shape."""


def take_out(state: Any) -> tuple[Any, Shares]:
    """Return a state with marks in place of what is sharded, and what was there.

    Raises:
        CheckpointError: if a tensor is cut otherwise than along its first dimension.
    """
    shares: Shares = {}

    def replace(path: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_sharded(value):
            return value
        _check_layout(path, value)
        shares[path] = local_part(value.detach()), tuple(value.shape)
        return {MARK: path}

    return _mapped(state, replace), shares


def put_back(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return a state with these tensors in place of their marks; other marks stay."""
    if isinstance(state, dict) and state.keys() == {MARK}:
        return tensors.get(state[MARK], state)
    if isinstance(state, dict):
        return {key: put_back(value, tensors) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(put_back(value, tensors) for value in state)
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
            f"a sharded tensor must be cut along its first dimension to be saved, got {path} as "
            f"{placements}: take an optimizer whose state has the shape of the parameters"
        )


def write_shares(folder: Path, shares: Shares, group: Any) -> dict[str, Any]:
    """Write every rank's share into a folder; all ranks call it.

    Args:
        folder: made here.
        shares: this rank's, on any device; of the same tensors on all ranks.
        group: of the ranks, for nothing else while this lasts.

    Returns:
        On rank 0, the index of the tensors and the size and checksum of each file; {} elsewhere.

    Raises:
        CheckpointError: on all ranks, if one cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415 - only who
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415 - shards pays

    from diptych.handlers.checkpointing.shard_storage import ShardWriter  # noqa: PLC0415

    writer = ShardWriter(folder)
    # A rank without a row of a tensor has nothing to say of it.
    mesh = _host_mesh(group)
    tensors = {
        path: _sharded(part.cpu(), shape, mesh)
        for path, (part, shape) in shares.items()
        if len(part)
    }
    try:
        save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        told = (f"rank {r}: {_last_line(e)}" for r, (e, _) in sorted(error.failures.items()))
        raise CheckpointError(f"shards {folder} could not be written: {'; '.join(told)}") from error
    files = _digests(folder, group)
    return {"tensors": writer.index, "files": files} if rank() == 0 else {}


def _last_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(type(error), error)).strip()


def _digests(folder: Path, group: Any) -> dict[str, list[int]]:
    """Return the size and checksum of each file, which the rank that wrote it reads back."""
    own: dict[str, list[int]] | str = {}
    try:
        own = {p.name: list(size_and_crc32(p)) for p in folder.glob(f"__{rank()}_*")}
    except OSError as error:
        own = str(error)
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, own, group=group)
    failing = [f"rank {r}: {text}" for r, text in enumerate(told) if isinstance(text, str)]
    if failing:
        raise CheckpointError(f"shards {folder} could not be read back: {'; '.join(failing)}")
    return {name: digest for files in told for name, digest in files.items()}


def check_shares(folder: Path, files: Mapping[str, list[int]], group: Any) -> None:
    """Check that the files of a folder are what was written; ranks that share it read some each.

    Raises:
        CheckpointError: naming a file that is not.
    """
    mine = sorted(files)[rank() :: world_size()] if group is not None else sorted(files)
    for name in mine:
        path = folder / name
        try:
            same = size_and_crc32(path) == tuple(files[name])
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not same:
            raise CheckpointError(f"{path} is damaged: it is not what was written")


def read_shares(
    folder: Path, index: Mapping[str, Mapping[str, Any]], group: Any
) -> dict[str, Tensor]:
    """Return tensors that `write_shares` wrote, on the CPU, whatever the number of ranks was.

    Args:
        folder: of the files.
        index: of the tensors to read.
        group: of the ranks, where each takes its share; None: whole tensors.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner  # noqa: PLC0415

    from diptych.handlers.checkpointing.shard_storage import ShardReader  # noqa: PLC0415

    found: dict[str, Tensor] = {}
    mesh = None if group is None else _host_mesh(group)
    for name, stored in index.items():
        shape, dtype = stored["shape"], stored["dtype"]
        if mesh is None:
            found[name] = torch.empty(shape, dtype=dtype)
        else:
            rows = len(own_rows(torch.empty(shape[0], device="meta")))
            found[name] = _sharded(torch.empty([rows, *shape[1:]], dtype=dtype), shape, mesh)
    # Each rank reads what it needs by itself: one that fails keeps no other waiting.
    reader, planner = ShardReader(folder, index), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    wanted: dict[str, Any] = {n: value for n, value in found.items() if len(local_part(value))}
    planner.set_up_planner(wanted, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    reader.read_data(plan, planner).wait()
    return found


def _host_mesh(group: Any) -> Any:
    from torch.distributed.device_mesh import DeviceMesh  # noqa: PLC0415

    return DeviceMesh.from_group(group, "cpu")


def _sharded(part: Tensor, shape: Any, mesh: Any) -> Tensor:
    """Return a share as torch's sharded tensor on the host."""
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415

    return DTensor.from_local(
        part,
        mesh,
        [Shard(0)],
        shape=torch.Size(shape),
        stride=torch.empty(tuple(shape), device="meta").stride(),
    )
