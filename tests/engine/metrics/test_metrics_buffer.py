"""The buffer of values that are published between two log points, row by row."""

from __future__ import annotations

import pytest
import torch

from diptych.engine.metrics.metrics_buffer import ScalarBuffer, mean_of_buffers


def test_values_published_together_and_alone_add_up_by_their_tags():
    window = ScalarBuffer()
    for n in range(3):
        window.add({"loss": torch.tensor(float(n)), "accuracy": torch.tensor(0.5)})
    window.add({"loss": torch.tensor(10.0)})
    window.add({"loss": 4, "host": 2.0})
    sums, gauges = window.drain({"rate": 0.1, "scale": torch.tensor(2)})
    assert sums == {"loss": (17.0, 5), "accuracy": (1.5, 3), "host": (2.0, 1)}
    assert gauges == {"rate": 0.1, "scale": 2.0}
    assert not window


def test_a_row_of_which_one_value_is_wrong_is_refused_by_its_tag():
    window = ScalarBuffer()
    with pytest.raises(ValueError, match=r"norms must be .* shape \(2,\)"):
        window.add({"loss": torch.tensor(1.0), "norms": torch.ones(2)})
    with pytest.raises(TypeError, match="name must be a number"):
        window.add({"loss": torch.tensor(1.0), "name": "high"})


def test_nothing_published_leaves_the_window_empty():
    window = ScalarBuffer()
    window.add({})
    assert not window
    assert window.state_dict() == {"rows": [], "numbers": {}}


def test_windows_of_several_ranks_become_one_with_their_means():
    states = []
    for first, second, number in ((1.0, 2.0, 4.0), (3.0, 6.0, 8.0)):
        window = ScalarBuffer()
        for value in (first, second):
            window.add({"loss": torch.tensor(value)})
        window.add({"host": number})
        states.append(window.state_dict())
    merged = ScalarBuffer()
    merged.load_state_dict(mean_of_buffers(states))
    assert merged.drain({})[0] == {"loss": (6.0, 2), "host": (6.0, 1)}
