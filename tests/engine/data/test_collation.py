"""Samples that cannot be collated are named by what does not fit."""

from __future__ import annotations

import pytest
import torch

from diptych.engine import BatchError
from diptych.engine.data.collation import collate_samples


def test_the_order_of_keys_is_not_taken_for_a_difference():
    samples = [{"a": torch.zeros(2), "b": 1}, {"b": 1, "a": torch.zeros(3)}]
    with pytest.raises(BatchError, match=r"equal shapes, got \(2,\) and \(3,\) in 'a'"):
        collate_samples(samples)


@pytest.mark.parametrize("other", [(1, 2), 3])
def test_samples_of_two_kinds_are_named(other):
    with pytest.raises(BatchError, match=r"of one kind, got a dict and a (int|tuple)"):
        collate_samples([{"a": torch.zeros(2)}, other])
