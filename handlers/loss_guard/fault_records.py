"""Fault records: files that contain everything needed to repeat an update."""

from __future__ import annotations

import copy
import dataclasses
import re
import zipfile
from collections import namedtuple
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from diptych.engine.data.seeded_loader import SeededLoader
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.dtensor import full_state
from diptych.engine.errors import CheckpointError, checkpoint_errors
from diptych.engine.state.checkpoint_structure import check_archive, load_plain
from diptych.engine.state.module_state import clean_state_dict, load_clean_state_dict
from diptych.engine.trainer import Trainer
from diptych.handlers.files import make_folder, write_atomically

FORMAT = 1
NAME = re.compile(r"iteration_(\d+)_rank_(\d+)\.pt")
KIND = "diptych.kind"
"""The key that marks a mapping in a file as an encoded object of another type."""


def record_path(directory: Path, iteration: int, of_rank: int) -> Path:
    """Return the path of the record of an update on one rank."""
    return directory / f"iteration_{iteration:08}_rank_{of_rank}.pt"


def update_state(trainer: Trainer) -> dict[str, Any]:
    """Return the state from which an update starts, without batch and random state, not copied.

    Only rank 0 includes the weights, which are equal on all ranks. All ranks must call this,
    because the weights of a sharded model are gathered.
    """
    state: dict[str, Any] = {
        "format": FORMAT,
        "iteration": trainer.state.iteration,
        "epoch": trainer.state.epoch,
        "rank": rank(),
        "ranks": world_size(),
        "settings": dict(trainer.identity.values["trainer"]),
        "trained": {
            part: [n for n, p in module.named_parameters() if p.requires_grad]
            for part, module in _parts(trainer).items()
        },
        "scaler": None if trainer.scaler is None else trainer.scaler.state_dict(),
    }
    weights = {part: full_state(clean_state_dict(m)) for part, m in _parts(trainer).items()}
    return state | weights if rank() == 0 else state


def load_update_state(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Load a state that `update_state` returned on rank 0.

    Raises:
        CheckpointError: if it belongs to another model or loss.
    """
    for part, module in _parts(trainer).items():
        try:
            trained = set(state["trained"][part])
            load_clean_state_dict(module, state[part])
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"the record is of another {part}: {error}") from error
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
    if trainer.scaler is not None and state["scaler"] is not None:
        trainer.scaler.load_state_dict(state["scaler"])


def _parts(trainer: Trainer) -> dict[str, torch.nn.Module]:
    return {"model": trainer.model, "loss": trainer.loss}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record atomically.

    Raises:
        CheckpointError: if it cannot be written.
    """
    plain = {**record, "batch": _as_plain(record["batch"])}
    # Torch reports a full disk as a RuntimeError.
    with checkpoint_errors(f"record {path} could not be written", OSError, RuntimeError):
        make_folder(path.parent)
        write_atomically(path, partial(torch.save, plain))


def read_record(path: Path) -> dict[str, Any]:
    """Read a record onto the CPU.

    Raises:
        CheckpointError: naming the file, if it is missing or damaged, or is not a record.
    """
    if not path.is_file():
        raise CheckpointError(
            f"record {path} does not exist. Records are in the directory of LossGuard, one file "
            "for each rank."
        )
    try:
        record = _read_intact(path)
        if not isinstance(record, dict) or "batch" not in record or "terms" not in record:
            raise CheckpointError("it is not a record of an update")  # noqa: TRY301
        return {**record, "batch": _from_plain(record["batch"])}
    except Exception as error:  # torch, zipfile and pickle raise different errors
        raise CheckpointError(
            f"record {path} cannot be read: {str(error).rstrip('.')}. Restore it from a copy, or "
            "replay another record."
        ) from error


def _read_intact(path: Path) -> Any:
    """Return the content of a file of `torch.save`, whose checksums torch does not compare."""
    check_archive(path, path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"it is damaged in its part {damaged}")
    return load_plain(path)


def sample_ids(trainer: Trainer, batch: Any, key: str) -> list[Any] | None:
    """Return the ids of a batch's samples, or None if they are unknown.

    They are the batch's entry `key` if it has one; otherwise the indices that a `SeededLoader` has
    read.
    """
    found = batch.get(key) if isinstance(batch, Mapping) else getattr(batch, key, None)
    if isinstance(found, Tensor):
        return list(found.tolist()) if found.ndim else [found.item()]
    if isinstance(found, (list, tuple)):
        return [item if isinstance(item, (int, str)) else str(item) for item in found]
    loader = trainer.batches.data
    if not isinstance(loader, SeededLoader):
        return None
    position = trainer.batches.position() or {}
    before = copy.copy(loader)  # its order depends on seed and position only
    before.load_state_dict({**position, "batch": position["batch"] - 1})
    return [index for _, index in next(before.batches(), [])]


def _as_plain(value: Any) -> Any:
    """Encode a batch in types that torch.load reads with weights_only=True.

    An object of another type becomes its repr.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _as_plain(item) for key, item in value.items()}
    fields = _fields_of(value)
    if fields is not None:
        return _as_fields(value, fields)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_as_plain, value))
    return _array_or_description(value)


def _as_fields(value: Any, fields: Sequence[str]) -> dict[str, Any]:
    kind = "named tuple" if isinstance(value, tuple) else "data class"
    parts = {name: _as_plain(getattr(value, name)) for name in fields}
    return {KIND: kind, "name": type(value).__name__, "fields": parts}


def _fields_of(value: Any) -> list[str] | None:
    if attrs.has(type(value)):
        return [field.name for field in attrs.fields(type(value))]
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return list(value._fields) if hasattr(value, "_fields") else None


def _array_or_description(value: Any) -> Any:
    if hasattr(value, "__array__"):
        try:
            return {KIND: "array", "tensor": torch.as_tensor(value)}
        except (TypeError, ValueError):  # an array of strings or objects
            return _as_plain(value.tolist()) if hasattr(value, "tolist") else repr(value)
    return repr(value)


def _from_plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_from_plain(item) for item in value)
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    if kind == "array":
        return value["tensor"].numpy()
    if kind is None:
        return {key: _from_plain(item) for key, item in value.items()}
    parts = {name: _from_plain(item) for name, item in value["fields"].items()}
    if kind == "named tuple":
        return namedtuple(value["name"], parts)(**parts)
    return dataclasses.make_dataclass(value["name"], parts)(**parts)
