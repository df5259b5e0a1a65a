"""Records of updates that went wrong: files that hold all that it takes to make one again."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections import namedtuple
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from diptych.engine.data.seeded_loader import SeededLoader
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.dtensor import whole_state
from diptych.engine.errors import CheckpointError
from diptych.engine.state.module_state import clean_state_dict, load_clean_state_dict
from diptych.engine.state.run_state import fingerprint
from diptych.engine.trainer import Trainer

FORMAT = 1
NAME = re.compile(r"iteration_(\d+)_rank_(\d+)\.pt")
KIND = "diptych.kind"
"""The key that marks a mapping in a file as something else than a mapping."""


def record_path(directory: Path, iteration: int, of_rank: int) -> Path:
    """Return the file of an update on one rank."""
    return directory / f"iteration_{iteration:08}_rank_{of_rank}.pt"


def update_state(trainer: Trainer) -> dict[str, Any]:
    """Return what an update starts from, but for batch and random state; tensors are the live ones.

    Rank 0 alone has the weights, which are equal on all ranks; a sharded model's are gathered, for
    which all ranks call this.
    """
    state: dict[str, Any] = {
        "format": FORMAT,
        "iteration": trainer.state.iteration,
        "epoch": trainer.state.epoch,
        "rank": rank(),
        "ranks": world_size(),
        "fingerprint": fingerprint(trainer),
        "trained": {
            part: [n for n, p in module.named_parameters() if p.requires_grad]
            for part, module in _parts(trainer).items()
        },
        "scaler": None if trainer.scaler is None else trainer.scaler.state_dict(),
    }
    weights = {part: whole_state(clean_state_dict(m)) for part, m in _parts(trainer).items()}
    return state | weights if rank() == 0 else state


def load_update_state(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Put a trainer into a state that `update_state` returned, of rank 0.

    Raises:
        CheckpointError: if it is of another model or loss.
    """
    for part, module in _parts(trainer).items():
        try:
            load_clean_state_dict(module, state[part])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the record is of another {part}: {error}") from error
        trained = set(state["trained"][part])
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
    if trainer.scaler is not None and state["scaler"] is not None:
        trainer.scaler.load_state_dict(state["scaler"])


def _parts(trainer: Trainer) -> dict[str, torch.nn.Module]:
    return {"model": trainer.model, "loss": trainer.loss}


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record; the file is there as a whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            torch.save({**record, "batch": _as_plain(record["batch"])}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            unfinished.unlink()
        raise CheckpointError(f"record {path} could not be written: {error}") from error


def read_record(path: Path) -> dict[str, Any]:
    """Return a record, on the CPU.

    Raises:
        CheckpointError: if the file is missing, or is no record.
    """
    if not path.is_file():
        raise CheckpointError(f"record {path} does not exist")
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle each have errors of their own
        raise CheckpointError(f"record {path} cannot be read: {error}") from error
    if not isinstance(record, dict) or "batch" not in record or "terms" not in record:
        raise CheckpointError(f"{path} is no record of an update")
    return {**record, "batch": _from_plain(record["batch"])}


def sample_ids(trainer: Trainer, batch: Any, key: str) -> list[Any] | None:
    """Return what is known of which samples a batch holds.

    That is what the batch has under `key`, or else the indices that a `SeededLoader` read.
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
    before = copy.copy(loader)  # the order is a function of seed and position alone
    before.load_state_dict({**position, "batch": position["batch"] - 1})
    return [index for _, index in next(before.batches(), [])]


def _as_plain(value: Any) -> Any:
    """Return a batch in containers and values that are read without running code.

    What no such file can hold becomes its description.
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
