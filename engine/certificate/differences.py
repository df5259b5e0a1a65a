"""The differences between two nested states, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn


@attrs.frozen
class Difference:
    """A value that an interruption changes, or that a checkpoint lacks.

    Attributes:
        name: the part of the run's state, or the object and its attribute.
        expected: the value without an interruption, as text.
        received: the value with one, as text.
    """

    name: str
    expected: str
    received: str

    def __str__(self) -> str:
        return f"{self.name}: {self.expected} without, {self.received} with an interruption"


def find_differences(name: str, expected: Any, received: Any) -> Iterator[Difference]:
    """Yield the leaves in which two nested states differ; skip leaves that are not plain values."""
    expected, received = _as_values(expected), _as_values(received)
    if isinstance(expected, Mapping) and isinstance(received, Mapping):
        for key in expected.keys() | received.keys():
            path = f"{name}.{key}" if name else str(key)
            yield from find_differences(path, expected.get(key), received.get(key))
    elif isinstance(expected, (list, tuple)) and isinstance(received, (list, tuple)):
        yield from _differences_of_items(name, expected, received)
    elif _is_value(expected) and _is_value(received) and not _equal(expected, received):
        yield Difference(name, _shown(expected), _shown(received))


def _as_values(value: Any) -> Any:
    return value.state_dict() if isinstance(value, nn.Module) else value


def _differences_of_items(
    name: str, expected: Sequence[Any], received: Sequence[Any]
) -> Iterator[Difference]:
    if len(expected) != len(received):
        yield Difference(name, f"{len(expected)} values", f"{len(received)} values")
    for index, pair in enumerate(zip(expected, received, strict=False)):
        yield from find_differences(f"{name}[{index}]", *pair)


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _equal(expected: Any, received: Any) -> bool:
    if isinstance(expected, Tensor) and isinstance(received, Tensor):
        same = expected.shape == received.shape and expected.dtype == received.dtype
        return same and torch.equal(_bits(expected), _bits(received).to(expected.device))
    if isinstance(expected, float) and isinstance(received, float) and math.isnan(expected):
        return math.isnan(received)
    return type(expected) is type(received) and bool(expected == received)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() > 1:
        return f"a tensor {tuple(value.shape)} of norm {value.detach().double().norm().item():.8g}"
    return str(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().to_dense().contiguous().reshape(-1).view(torch.uint8)
