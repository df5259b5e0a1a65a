"""Attribute paths: read and set values such as "loss.weights.vicreg" of a trainer."""

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
        ValueError: if a part of the path does not exist; the message lists similar names.
        TypeError: if the value is a tensor (a parameter or a buffer) or a module.
    """
    owner, last = _owner(trainer, path)
    value = _get(owner, last, path)
    if isinstance(value, (Tensor, nn.Module)):
        raise TypeError(
            f"{path} must be a plain value that can be set, got a {type(value).__name__}"
        )
    return value


def write_attribute(trainer: Trainer, path: str, value: Any) -> None:
    """Set the value at a path that `read_attribute` accepts."""
    owner, last = _owner(trainer, path)
    if isinstance(owner, MutableMapping):
        owner[_key(owner, last)] = value
    elif isinstance(owner, MutableSequence):
        owner[int(last)] = value
    else:
        setattr(owner, last, value)


def try_attribute(trainer: Trainer, path: str, *values: Any) -> None:
    """Set a path to each of `values` and restore it, so that a setter's error is raised early.

    Raises:
        ValueError: see `read_attribute`, or raised by the setter.
        TypeError: see `read_attribute`.
    """
    before = read_attribute(trainer, path)
    try:
        for value in values:
            write_attribute(trainer, path, value)
    finally:
        write_attribute(trainer, path, before)


def _owner(trainer: Trainer, path: str) -> tuple[Any, str]:
    """Return the object that has the last part of a path, and that part."""
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
            f"no {part!r}. {near_matches(part, _names(owner))}"
        ) from error


def _names(owner: Any) -> list[str]:
    """Return the public names of an object, or the keys of a mapping or sequence."""
    if isinstance(owner, MutableMapping):
        return [str(key) for key in owner]
    if isinstance(owner, MutableSequence):
        return [str(index) for index in range(len(owner))]
    children = dict(owner.named_children()) if isinstance(owner, nn.Module) else {}
    names = dict.fromkeys([*children, *getattr(owner, "__dict__", {}), *dir(owner)])
    inherited = dir(nn.Module) if isinstance(owner, nn.Module) else ()
    return [name for name in names if not name.startswith("_") and name not in inherited]


def _key(owner: MutableMapping[Any, Any], part: str) -> Any:
    return part if part in owner else {str(key): key for key in owner}[part]
