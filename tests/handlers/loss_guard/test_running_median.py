"""RunningMedian: limits against those of plain lists."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.handlers.loss_guard.running_median import RunningMedian

TRUE, FALSE = torch.tensor(True), torch.tensor(False)
values = st.floats(-1e3, 1e3, width=32)


def limit_of(series: list[float], factor: float) -> float:
    """Return the limit by its definition, with lower medians."""
    median = statistics.median_low(series)
    spread = statistics.median_low([abs(value - median) for value in series])
    return median + factor * max(spread, 0.1 * abs(median))


@given(st.lists(st.tuples(values, values), min_size=5, max_size=12), st.floats(0.5, 30))
def test_limits_are_medians_plus_spreads_of_the_last_values(pairs, factor):
    median = RunningMedian(5, factor)
    for pair in pairs:
        median.add(torch.tensor(pair, dtype=torch.float64), TRUE)
    limits = median.limits(torch.zeros(2, dtype=torch.float64))
    for index in range(2):
        expected = limit_of([pair[index] for pair in pairs[-5:]], factor)
        assert float(limits[index]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_there_is_no_limit_before_the_window_is_full():
    median = RunningMedian(3, 2.0)
    for _ in range(3):
        assert median.limits(torch.zeros(1)).item() == math.inf
        median.add(torch.ones(1), TRUE)
    assert median.limits(torch.zeros(1)).item() == pytest.approx(1.2)


def test_a_value_that_is_not_accepted_does_not_enter_the_window():
    median = RunningMedian(2, 2.0)
    for value, accepted in ((1.0, TRUE), (math.nan, FALSE), (99.0, FALSE), (1.0, TRUE)):
        median.add(torch.tensor([value]), accepted)
    assert median.to_lists() == [[1.0, 1.0]]


def test_windows_can_be_saved_and_loaded_as_lists():
    median, again = RunningMedian(4, 2.0), RunningMedian(4, 2.0)
    for value in (1.0, 5.0, 2.0):
        median.add(torch.tensor([value, -value]), TRUE)
    again.from_lists(median.to_lists())
    for each in (median, again):
        each.add(torch.tensor([7.0, 3.0]), TRUE)
    assert again.to_lists() == median.to_lists() == [[1.0, 5.0, 2.0, 7.0], [-1.0, -5.0, -2.0, 3.0]]
    assert torch.equal(again.limits(torch.zeros(2)), median.limits(torch.zeros(2)))
    again.reset()
    assert again.to_lists() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_restored_values_give_the_same_limits_bit_for_bit(dtype):
    median, again = RunningMedian(3, 2.0), RunningMedian(3, 2.0)
    for value in (0.1, 0.3, 0.2):
        median.add(torch.tensor([value], dtype=dtype), TRUE)
    again.from_lists(median.to_lists())
    like = torch.zeros(1, dtype=dtype)
    assert again.limits(like).equal(median.limits(like))
