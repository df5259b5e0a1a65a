"""The values that a checkpoint may hold: all that is read back, and a word about the rest."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.engine import CheckpointError
from diptych.engine.state.plain_state import plain_state
from tests.engine.models import stored

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
STATES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
)


@given(state=STATES)
def test_what_passes_is_read_back_as_it_was(state: Any):
    assert stored(plain_state({"state": state})) == {"state": state}


def test_numbers_of_numpys_become_pythons():
    given = OrderedDict(a=np.float64(0.1), b=[np.int32(3), (np.bool_(True),)])
    found = stored(plain_state(given))
    assert found == OrderedDict(a=0.1, b=[3, (True,)])
    assert [type(found["a"]), type(found["b"][0])] == [float, int]


class Level(IntEnum):
    LOW = 1


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.zeros(2), "numpy.ndarray"),
        (len, "builtin_function_or_method"),
        (Level.LOW, "Level"),
        (namedtuple("Pair", "a b")(1, 2), "Pair"),
        ({1, 2}, "builtins.set"),
        (torch.nn.Linear(1, 1), "Linear"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_read_back_is_refused_where_it_stands(value: Any, kind: str):
    with pytest.raises(CheckpointError, match=rf"handlers.Best.seen\[1\] must .*got a .*{kind}"):
        plain_state({"handlers": {"Best": {"seen": [0, value]}}})
