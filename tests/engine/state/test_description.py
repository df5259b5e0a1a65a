"""Descriptions of values: equal for equal values in any process, different for others."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import logging
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diptych.engine.state.description import Describer, code_digest, tensor_digest
from tests.losses.processes import printed


def described(value: Any) -> Any:
    return Describer().describe(value, "value")


@attrs.define
class Crop:
    size: int
    _share: float = 0.5
    seen: int = attrs.field(default=0, init=False)


@dataclasses.dataclass
class Blur:
    sigma: float


class Words:
    def __init__(self, length: int, tokenizer: Any = None) -> None:
        self.length, self.tokenizer = length, tokenizer

    def __call__(self, text: str) -> str:
        return text[: self.length]


class Colour(enum.Enum):
    RED = 1


def scaled_by(factor: Any) -> Any:
    return lambda batch: batch * factor


def first(batch: Any, count: int = 2) -> Any:
    return batch[:count]


def last(batch: Any, count: int = 2) -> Any:
    return batch[-count:]


PAIRS: list[tuple[Any, Any]] = [
    (1, 2),
    (1, 1.5),
    (torch.zeros(3), torch.ones(3)),
    (torch.zeros(3), torch.zeros(3).double()),
    (torch.zeros(2, 3), torch.zeros(3, 2)),
    (np.zeros(3), np.ones(3)),
    (torch.float32, torch.float64),
    (Crop(2), Crop(3)),
    (Crop(2, share=0.1), Crop(2, share=0.2)),
    (Blur(0.1), Blur(0.2)),
    (Words(2), Words(3)),
    (Words(2).__call__, Words(3).__call__),
    (nn.Dropout(0.1), nn.Dropout(0.2)),
    (nn.ReLU(), nn.GELU()),
    (nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.2))),
    (scaled_by(2), scaled_by(3)),
    (first, last),
    (functools.partial(first, count=1), functools.partial(first, count=3)),
    (functools.partial(first, count=1), first),
    ({"a": [1, (2, 3)]}, {"a": [1, (2, 4)]}),
    ({1, 2}, {1, 3}),
    ([*range(100)], [*range(1, 101)]),
    (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
    (Colour.RED, "RED"),
    (nn.Linear, nn.Conv2d),
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=range(len(PAIRS)))
def test_values_that_differ_have_different_descriptions(one: Any, other: Any):
    assert described(one) == described(one)
    assert described(one) != described(other)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_a_description_can_be_written_as_json(value: Any):
    json.dumps(described(value), allow_nan=False)


def test_no_description_contains_an_address():
    values = [object(), Words(2, tokenizer=object()), scaled_by(object()), first, Crop(2)]
    assert "0x" not in json.dumps(described(values))


def test_a_value_without_a_description_is_named_with_its_type():
    describer = Describer()
    describer.describe(Words(2, tokenizer=iter(())), "task")
    assert describer.not_compared == {"task.tokenizer": "tuple_iterator"}


def test_neither_progress_nor_place_enters_a_description():
    seen = Crop(2)
    seen.seen = 3
    assert described(seen) == described(Crop(2))
    assert described(Path("here")) == described(Path("there"))
    batches: list[int] = []
    collecting = lambda batch: batches.append(batch)  # noqa: E731, PLW0108 - its closure is the point
    before = described(collecting)
    collecting(1)
    assert described(collecting) == before


def test_a_logger_is_described_by_its_class_alone():
    describer = Describer()
    logger = logging.getLogger("of.a.handler")
    assert describer.describe({"logger": logger}, "value") == {"logger": "logging.Logger"}
    assert not describer.not_compared


def test_learned_values_are_no_part_of_a_module():
    assert described(nn.Linear(3, 2)) == described(nn.Linear(3, 2))
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other.running_mean += 1
    assert described(one) != described(other)


def test_the_digest_of_code_depends_on_the_code_and_not_on_its_place():
    source = "def f(batch):\n    return batch in {'a', 'b'} and [x + 1 for x in batch]"
    spaces = [compile("\n" * lines + source, f"{lines}.py", "exec") for lines in (0, 9)]
    functions = [space.co_consts[0] for space in spaces]
    assert code_digest(functions[0]) == code_digest(functions[1])
    other = compile(source.replace("x + 1", "x + 2"), "0.py", "exec").co_consts[0]
    assert code_digest(other) != code_digest(functions[0])


def test_a_description_is_the_same_in_another_process():
    program = (
        "import json; from tests.engine.state import test_description as t\n"
        "print(json.dumps([t.described(pair) for pair in t.PAIRS]))"
    )
    assert json.loads(printed(program)) == json.loads(json.dumps([described(p) for p in PAIRS]))


def test_a_large_tensor_is_described_by_a_sample_of_its_elements():
    large = torch.arange(3 * 2**20)
    before = tensor_digest(large)
    large += 1
    assert tensor_digest(large) != before
