"""Nested containers: a function applied to every leaf, a comparison, the parts of an object."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def map_leaves(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Return `batch` with `function` applied to each leaf; containers keep their types.

    Containers are mappings, attrs classes, dataclasses, named tuples, and tuples and lists that
    hold a tensor or a container. Everything else is a leaf: a tensor, a number, a list of strings.
    """
    kind = type(batch)
    if kind is Tensor:  # first, since the tests below take microseconds
        return function(batch)
    if kind in {tuple, list} and set(map(type, batch)) == {Tensor}:
        return kind(map(function, batch))
    if isinstance(batch, (tuple, list)) and _holds_containers(batch):
        # A named tuple takes its values one by one.
        rebuild = getattr(batch, "_make", kind)
        return rebuild([map_leaves(value, function) for value in batch])
    if kind is dict or isinstance(batch, Mapping):
        items = {key: map_leaves(value, function) for key, value in batch.items()}
        return _rebuild_mapping(batch, items)
    return _map_fields(batch, function)


def _map_fields(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Apply the function to the fields of an attrs class or a dataclass, or to another leaf."""
    kind = type(batch)
    if attrs.has(kind):
        taken = {f.alias: f.name for f in attrs.fields(kind) if f.init}
    elif _is_dataclass(batch):
        taken = {f.name: f.name for f in dataclasses.fields(batch) if f.init}
    else:
        return function(batch)
    fields = {key: map_leaves(getattr(batch, name), function) for key, name in taken.items()}
    return (
        attrs.evolve(batch, **fields) if attrs.has(kind) else dataclasses.replace(batch, **fields)
    )


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _rebuild_mapping(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(batch) is dict:
        return items
    try:
        return type(batch)(items)  # type: ignore[call-arg]
    except TypeError:
        return items


def _holds_containers(values: Sequence[Any]) -> bool:
    if hasattr(values, "_make"):
        return True
    kinds = (Tensor, Mapping, tuple, list)
    if values and isinstance(values[0], kinds):
        return True
    return any(isinstance(v, kinds) or attrs.has(type(v)) or _is_dataclass(v) for v in values)


def leaves(batch: Any) -> list[Any]:
    """Return the leaves of `batch` in the order of its containers."""
    found: list[Any] = []
    map_leaves(batch, lambda leaf: found.append(leaf) or leaf)  # type: ignore[func-returns-value]
    return found


def held_of(kind: type[T], owner: T) -> Iterator[T]:
    """Yield an object and those of its kind in its attributes: the metrics of a `MetricGroup`."""
    yield owner
    for value in vars(owner).values():
        held = list(value.values()) if isinstance(value, dict) else value
        for part in held if type(held) in {list, tuple} else [held]:
            if isinstance(part, kind):
                yield from held_of(kind, part)


def same_values(one: Any, other: Any) -> bool:
    """Say whether two samples are equal; values that cannot be compared, and NaN, are not."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same_values(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_values, one, other))
    try:
        return _same_leaves(one, other)
    except (TypeError, ValueError):
        return False


def _same_leaves(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)
