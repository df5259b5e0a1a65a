"""Batches of any containers: moved, cut and joined."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diptych.engine import BatchError
from diptych.engine.containers import map_leaves
from diptych.engine.data.batches import batch_size, join_batches, split_batch, to_device


@attrs.frozen
class Views:
    """An attrs batch, with a private field and one that the constructor does not take."""

    first: Tensor
    _second: Tensor
    pair: int = attrs.field(init=False, default=7)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A dataclass batch."""

    image: Tensor
    name: Any = "a"


class Pair(NamedTuple):
    """A named tuple batch."""

    left: Any
    right: Any


CONTAINERS = {
    "dict": lambda a, b: {"a": a, "b": b},
    "OrderedDict": lambda a, b: OrderedDict(a=a, b=b),
    "UserDict": lambda a, b: UserDict(a=a, b=b),
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "named tuple": Pair,
    "attrs": Views,
    "dataclass": Sample,
}


def tensors_of(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_leaves(batch, lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


@pytest.mark.parametrize("outer", CONTAINERS)
@pytest.mark.parametrize("inner", CONTAINERS)
def test_every_tensor_in_every_nesting_is_moved_and_the_types_stay(outer: str, inner: str):
    batch = CONTAINERS[outer](
        CONTAINERS[inner](torch.ones(3), torch.zeros(3, 2)), CONTAINERS[inner](torch.ones(3), "x")
    )
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert [tensor.device.type for tensor in tensors_of(moved)] == ["meta"] * 3
    assert all(tensor.device.type == "cpu" for tensor in tensors_of(batch))
    types: list[type] = []
    map_leaves(moved, lambda leaf: types.append(type(leaf)))
    assert types.count(str) == 1


def test_mappings_that_cannot_be_built_from_items_become_dictionaries():
    for mapping in (MappingProxyType({"a": torch.ones(2)}), defaultdict(list, a=torch.ones(2))):
        moved = to_device(mapping, torch.device("meta"))
        assert moved["a"].device.type == "meta"


def test_leaves_of_other_kinds_stay_as_they_are():
    batch = {"names": ["a", "b"], "rate": 0.5, "none": None, "array": np.ones(2)}
    moved = to_device(batch, torch.device("cpu"))
    assert all(moved[key] is batch[key] for key in batch)


def nested(samples: int, inner: str, outer: str) -> Any:
    parts = (torch.arange(samples * 2).reshape(samples, 2), torch.arange(samples) + 0.5)
    features = CONTAINERS[inner](*parts)
    names = [f"name {n}" for n in range(samples)]
    return CONTAINERS[outer]({"x": features, "names": names}, torch.arange(samples))


def plain(batch: Any) -> list[Any]:
    """Return the leaves of a batch in a form that compares."""
    found: list[Any] = []
    map_leaves(
        batch, lambda leaf: found.append(leaf.tolist() if isinstance(leaf, Tensor) else leaf)
    )
    return found


@given(
    samples=st.integers(1, 17),
    size=st.integers(1, 20),
    inner=st.sampled_from(sorted(CONTAINERS)),
    outer=st.sampled_from(sorted(CONTAINERS)),
)
def test_join_undoes_split(samples: int, size: int, inner: str, outer: str):
    batch = nested(samples, inner, outer)
    pieces = split_batch(batch, size)
    sizes = [batch_size(piece) for piece in pieces]
    assert len(pieces) == -(-samples // size)
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    whole = join_batches(pieces)
    assert type(whole) is type(batch)
    assert plain(whole) == plain(batch)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_split_undoes_join_where_the_pieces_are_even(sizes: list[int]):
    size = sizes[0]
    pieces = [{"x": torch.randn(size, 2), "names": ["n"] * size} for _ in sizes]
    again = split_batch(join_batches(pieces), size)
    assert [plain(piece) for piece in again] == [plain(piece) for piece in pieces]


def test_what_is_not_per_sample_goes_into_every_piece():
    batch = {
        "x": torch.arange(4),
        "scale": torch.tensor(2.0),
        "rate": 0.5,
        "table": torch.ones(9, 2),
    }
    for piece in split_batch(batch, 2):
        assert piece["scale"] == 2.0
        assert piece["rate"] == 0.5
        assert piece["table"].shape == (9, 2)


def test_arrays_are_cut_and_joined_like_tensors():
    batch = {"x": torch.arange(5), "ids": np.arange(5) * 10}
    pieces = split_batch(batch, 2)
    assert [piece["ids"].tolist() for piece in pieces] == [[0], [10, 20], [30, 40]]
    assert join_batches(pieces)["ids"].tolist() == [0, 10, 20, 30, 40]


@pytest.mark.parametrize("batch", [{"x": torch.ones(())}, [], {"names": "abc"}, None, [1, 2]])
def test_a_batch_without_a_sample_dimension_is_a_clear_error(batch):
    with pytest.raises(BatchError, match="must hold a tensor whose first dimension"):
        batch_size(batch)


def test_the_batch_size_is_that_of_the_first_tensor_with_a_dimension():
    assert batch_size((torch.ones(()), {"x": [torch.ones(5, 2), torch.ones(3)]})) == 5


def test_batches_of_different_structure_do_not_join():
    with pytest.raises(BatchError, match="must have one structure"):
        join_batches([{"x": torch.ones(1)}, {"x": torch.ones(1), "y": torch.ones(1)}])
