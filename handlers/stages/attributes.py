"""Attributes by their paths from the trainer: "loss.weights.vicreg", "model.head.scale"."""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence
from typing import Any

from torch import Tensor, nn

from diptych.engine.name_patterns import near_matches
from diptych.engine.trainer import Trainer

ROOTS = ("loss", "model", "task")


def read_attribute(trainer: Trainer, path: str) -> Any:
    """Return the value at a path, which begins with "loss", "model" or "task".

    Raises:
        ValueError: if a part of the path is not there; the message lists the near ones.
        TypeError: if the value is a tensor (what is learned, or a buffer) or a module.
    """
    owner, last = _owner(trainer, path)
    value = _get(owner, last, path)
    if isinstance(value, (Tensor, nn.Module)):
        raise TypeError(
            f"{path} must be a plain value that can be set, got a {type(value).__name__}"
        )
    return value


def write_attribute(trainer: Trainer, path: str, value: Any) -> None:
    """Set the value at a path that `read_attribute` knows."""
    owner, last = _owner(trainer, path)
    if isinstance(owner, MutableMapping):
        owner[_key(owner, last)] = value
    elif isinstance(owner, MutableSequence):
        owner[int(last)] = value
    else:
        setattr(owner, last, value)


def try_attribute(trainer: Trainer, path: str, *values: Any) -> None:
    """Set the value at a path to each of these and back, so that a setter can refuse them now.

    Raises:
        ValueError: as `read_attribute`, or what the setter raises.
        TypeError: as `read_attribute`.
    """
    there = read_attribute(trainer, path)
    try:
        for value in values:
            write_attribute(trainer, path, value)
    finally:
        write_attribute(trainer, path, there)


def _owner(trainer: Trainer, path: str) -> tuple[Any, str]:
    """Return what holds the last part of a path, and that part."""
    first, *middle, last = path.split(".") if "." in path else (path, path)
    if first not in ROOTS or first == path:
        raise ValueError(
            f"a path must begin with {', '.join(ROOTS)} and name an attribute of it, got {path!r}"
        )
    owner = getattr(trainer, first)
    for part in middle:
        owner = _get(owner, part, path)
    return owner, last


def _get(owner: Any, part: str, path: str) -> Any:
    try:
        if isinstance(owner, MutableMapping):
            return owner[_key(owner, part)]
        if isinstance(owner, MutableSequence):
            return owner[int(part)]
        return getattr(owner, part)
    except (AttributeError, LookupError, ValueError) as error:
        raise ValueError(
            f"each part of a path must be an attribute, got {path!r}: {type(owner).__name__} has "
            f"no {part!r}; {near_matches(part, _names(owner))}"
        ) from error


def _names(owner: Any) -> list[str]:
    """Return the names of what an object, a mapping or a sequence holds for others to see."""
    if isinstance(owner, MutableMapping):
        return [str(key) for key in owner]
    if isinstance(owner, MutableSequence):
        return [str(index) for index in range(len(owner))]
    children = dict(owner.named_children()) if isinstance(owner, nn.Module) else {}
    names = dict.fromkeys([*children, *getattr(owner, "__dict__", {}), *dir(owner)])
    machinery = dir(nn.Module) if isinstance(owner, nn.Module) else ()
    return [name for name in names if not name.startswith("_") and name not in machinery]


def _key(owner: MutableMapping[Any, Any], part: str) -> Any:
    return part if part in owner else {str(key): key for key in owner}[part]
