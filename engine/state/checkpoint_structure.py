"""Checks of a checkpoint that comes from elsewhere: its archive, its size, its parts."""

from __future__ import annotations

import itertools
import random
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from diptych.engine.errors import CheckpointError

FORMAT = 3
"""The layout of a checkpoint; it rises when an older version could not read a new one.

1 named the handlers' states by class alone, 2 names them by `Handler.key`; 3 holds the identity of
the run instead of a few of its settings."""

DEPTH = 200
"""Containers inside one another that a checkpoint may hold."""
GROWTH = 16
"""Times its own size that a checkpoint may take once it is unpacked, beside `ALLOWANCE`."""
ALLOWANCE = 1 << 20

REFUSED = "Weights only load failed"
"""The beginning of torch's text about a file that it does not unpickle. It goes on with the advice
to unpickle everything, and has codes of a terminal."""

OUTLINED = ("trainer", "metrics", "last_metrics", "handlers", "data", "current", "iteration")
"""The parts whose content a checkpoint outlines."""
LONGEST_OUTLINED, MOST_OUTLINED = 256, 10_000
"""The longest container, and the values of all, that an outline describes one by one."""

PARTS: dict[str, Any] = {
    "format": int,
    "model": dict,
    "loss": dict,
    "optimizer": {"state": dict, "param_groups": [{"params": list}]},
    "trainer": {
        "iteration": int,
        "epoch": int,
        "epoch_iteration": int,
        "epoch_length": (int, type(None)),
    },
    "metrics": [{"window": dict, "epoch": dict, "history": dict}],
    "last_metrics": dict,
    "handlers": dict,
    "random": [
        {
            "python": {"version": int, "internal": list},
            "numpy": {"keys": Tensor, "position": int, "has_gauss": int, "cached": (int, float)},
            "torch": Tensor,
            "cuda": list,
        }
    ],
    "data": [object],
    "saved": {"epoch": int, "metrics": dict},
}
"""The parts that every checkpoint has: a type, a mapping of such parts, or a list of them."""
OPTIONAL: dict[str, Any] = {
    "identity": dict,
    "current": dict,
    "parameters": [list],
    "scaler": (dict, type(None)),
    "skipped_steps": Tensor,
    "skipped_batches": int,
    "evaluated": dict,
    "entry": dict,
    "iteration": [dict],
    "shards": {"folder": str, "tensors": dict, "files": dict},
}
"""The parts that some checkpoints have."""


def check_archive(file: Path | BinaryIO, size: int) -> None:
    """Check that a file is an archive as `torch.save` writes it, before anything is unpacked.

    Raises:
        CheckpointError: if it is another file, or its members are compressed or share bytes.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"it is not an archive of torch.save: {error}") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError("it has compressed members, which torch.save does not write")
    unpacked = sum(member.file_size for member in members)
    if unpacked > size:
        raise CheckpointError(f"it unpacks to {unpacked} bytes from {size}")


def load_plain(path: Path) -> Any:
    """Read a file of `torch.save` that holds tensors and plain values only, onto the CPU.

    Raises:
        CheckpointError: if it holds another object, which is not unpickled, since that may run any
            code; if it is no such file; as `check_unpacked`.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if REFUSED not in str(error):
            raise
        raise CheckpointError(_refusal(str(error))) from error
    check_unpacked(state, path.stat().st_size)
    return state


def _refusal(text: str) -> str:
    """Return a message for torch's text about a file that it has refused."""
    refused = re.search(r"GLOBAL (\S+)|got <class '([^']+)'>", text)
    if refused is None:
        reason = text.partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        return f"it must be a file of torch.save, got another or a damaged one ({reason})"
    return (
        f"it must hold tensors and plain values only, got an object of {refused[1] or refused[2]}. "
        "The program that wrote it has probably saved its options or the whole model. Save the "
        "state dict alone in that program: torch.save(model.state_dict(), path)"
    )


def check_unpacked(state: Any, size: int) -> None:
    """Check that a state holds little more than the file that it was read from.

    A tensor may repeat a few bytes of a file without end, and a list may hold another one twice,
    which holds another one twice. Copying such a state would fill the memory.

    Raises:
        CheckpointError: if the state is too large, too deep, or holds a tensor without data.
    """
    limit = GROWTH * size + ALLOWANCE
    total, seen = 0, set[Any]()
    for depth, value in _values(state):
        if depth > DEPTH:
            raise CheckpointError(f"its containers are nested more than {DEPTH} deep")
        total += 1
        if isinstance(value, Tensor):
            if value.device.type != "cpu":
                raise CheckpointError("it holds a tensor without data")
            view = _view(value)
            total += 0 if view in seen else _bytes(value)
            seen.add(view)
        if total > limit:
            raise CheckpointError(f"it unpacks to more than {limit} bytes from {size}")


def _values(state: Any) -> Iterator[tuple[int, Any]]:
    """Yield every value in nested containers with its depth, without recursion."""
    left = [(0, state)]
    while left:
        depth, value = left.pop()
        yield depth, value
        if isinstance(value, Mapping):
            left.extend((depth + 1, item) for item in value.values())
        elif isinstance(value, (list, tuple)):
            left.extend((depth + 1, item) for item in value)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() if tensor.layout == torch.strided else 0


def _view(tensor: Tensor) -> Any:
    """Return what two equal views of one memory share."""
    if tensor.layout != torch.strided:
        return id(tensor)
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *place, tuple(tensor.shape), tensor.stride(), tensor.dtype


def check_parts(state: Any) -> None:
    """Check that a state has the parts of a checkpoint, each of its type, before any is loaded.

    A state of a later format is not checked: whoever loads it refuses it.

    Raises:
        CheckpointError: naming a part that is missing or of another type.
    """
    if isinstance(state, dict) and type(state.get("format")) is int and state["format"] > FORMAT:
        return
    _check(state, PARTS, "")
    _check(state, {name: part for name, part in OPTIONAL.items() if name in state}, "")
    _check_modules(state)
    _check_metrics(state)
    optimizer = state["optimizer"]
    _check_numbering(optimizer, state.get("parameters"))
    _check_outlines(state)
    _check_position(state)
    for number, generators in enumerate(state["random"]):
        _check_generators(generators, f"random[{number}]")


def _check_modules(state: Mapping[str, Any]) -> None:
    """Check that modules have tensors, or what stands for a sharded one."""
    for name in ("model", "loss"):
        for key, value in state[name].items():
            # A module may have a state of any type beside its tensors.
            if not str(key).endswith("_extra_state"):
                _check(value, (Tensor, dict), f"{name}.{key}")


def _check_metrics(state: Mapping[str, Any]) -> None:
    for key, value in state["last_metrics"].items():
        _check(value, (int, float), f"last_metrics.{key}")
    for number, held in enumerate(state["metrics"]):
        for key, mean in held["epoch"].items():
            if not isinstance(mean, (list, tuple)) or len(mean) != 2:  # a sum and a count
                raise CheckpointError(f"metrics[{number}].epoch.{key} must be a sum and a count")


def outline_of(optimizer: Mapping[str, Any]) -> dict[str, str]:
    """Return the kind of each value in an optimizer's state, by parameter and name.

    An optimizer restarts silently for a parameter that has lost its state. So a
    checkpoint says what its optimizer had.
    """
    return {
        f"{index}.{key}": _kind(value)
        for index, values in optimizer["state"].items()
        for key, value in values.items()
    }


def _check_numbering(state: Mapping[str, Any], names: list[Any] | None) -> None:
    """Check that parameters are numbered, each once, have names, and that no other has a state."""
    groups = [group["params"] for group in state["param_groups"]]
    sizes = list(map(len, groups))
    if names is not None and list(map(len, names)) != sizes:
        raise CheckpointError(f"parameters must name {sizes} parameters of optimizer.param_groups")
    params = list(itertools.chain(*groups))
    if set(map(type, params)) - {int} or len(set(params)) != len(params):
        raise CheckpointError("optimizer.param_groups must number each parameter once")
    for key, value in state["state"].items():
        _check(value, dict, f"optimizer.state.{key}")
        if key not in params:
            raise CheckpointError(f"optimizer.state.{key} is of no parameter")


def outline_of_parts(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the kind of each value in the parts of a state that handlers and loaders determine.

    What is in them is not known here. So a checkpoint says it, as it does for its optimizer.
    """
    outline: dict[str, str] = {}
    left = [(name, state[name]) for name in OUTLINED if name in state]
    while left and len(outline) < MOST_OUTLINED:
        path, value = left.pop()
        outline[path] = _kind(value)
        if isinstance(value, (Mapping, list, tuple)) and len(value) <= LONGEST_OUTLINED:
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            left.extend((f"{path}.{key}", item) for key, item in items)
    return outline


def _kind(value: Any) -> str:
    is_tensor = isinstance(value, Tensor)
    return f"a tensor of {list(value.shape)}" if is_tensor else f"a {type(value).__name__}"


def _check_outlines(state: Mapping[str, Any]) -> None:
    entry = state.get("entry", {})
    for key, prefix, found in (
        ("optimizer", "optimizer.state.", outline_of(state["optimizer"])),
        ("parts", "", outline_of_parts(state)),
    ):
        if key in entry:  # an earlier version wrote none
            _check(entry[key], dict, f"entry.{key}")
            _check_outline(found, entry[key], prefix)


def _check_outline(found: Mapping[str, str], outline: Mapping[str, str], prefix: str) -> None:
    for name in (*outline, *found):
        wanted, got = outline.get(name, "missing"), found.get(name, "none")
        if wanted != got:
            raise CheckpointError(f"{prefix}{name} must be {wanted}, got {got}")


def _check_position(state: Mapping[str, Any]) -> None:
    """Check that a state is of the position for which its file was written."""
    entry = state.get("entry", {})
    found = {"iteration": state["trainer"]["iteration"], "epoch": state["saved"]["epoch"]}
    for name, value in found.items():
        if entry.get(name, value) != value:
            raise CheckpointError(f"its {name} must be {entry[name]}, got {value}")


def _check_generators(state: Mapping[str, Any], path: str) -> None:
    """Check that generators accept a state, with generators that nobody uses."""
    python, numpy = state["python"], state["numpy"]
    try:
        random.Random().setstate((python["version"], tuple(python["internal"]), python["gauss"]))
        torch.Generator().set_state(state["torch"])
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} is no state of a random generator: {error}") from error
    if numpy["keys"].shape != (624,) or not 0 <= numpy["position"] <= 624:
        raise CheckpointError(f"{path}.numpy is no state of a random generator")


def _check(value: Any, expected: Any, path: str) -> None:
    if isinstance(expected, dict):
        _check_type(value, dict, path)
        for key, part in expected.items():
            inner = f"{path}.{key}".lstrip(".")
            if key not in value:
                raise CheckpointError(f"it lacks the part {inner}")
            _check(value[key], part, inner)
    elif isinstance(expected, list):
        _check_type(value, list, path)
        if not value:
            raise CheckpointError(f"{path} must not be empty")
        for number, item in enumerate(value):
            _check(item, expected[0], f"{path}[{number}]")
    else:
        _check_type(value, expected, path)


def _check_type(value: Any, kind: Any, path: str) -> None:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(each.__name__ for each in kinds)
        got = type(value).__name__
        raise CheckpointError(f"{path or 'the whole'} must be a {wanted}, got a {got}")
