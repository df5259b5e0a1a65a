"""A function whose kernels are recorded is called first, and recorded once for each form of inputs.

What a recording computes is tested on a GPU, with the losses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.losses.base.tiles.replay import Recordings, replayed


def doubled(x: Tensor, shift: float) -> tuple[Tensor, ...]:
    """Return 2 x + shift."""
    return (2 * x + shift,)


class Recorder:
    """Makes recordings that call the function, and counts them and their calls."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        self.pools: list[Any] = []

    def __call__(self, function: Any, inputs: Any, pool: Any) -> Any:
        del inputs
        self.recorded += 1
        self.pools.append(pool)

        def recording(inputs: tuple[Any, ...]) -> Any:
            self.replayed += 1
            return function(*inputs)

        return recording


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def recordings(recorder: Recorder) -> Recordings:
    return Recordings(recorder, object)


def run(recordings: Recordings, x: Tensor, shift: float = 1.0, stream: int = 0) -> None:
    """Run once, and check the result."""
    (found,) = recordings.run(doubled, (x, shift), stream)
    assert found.equal(2 * x + shift)


def test_the_third_call_is_recorded_and_later_ones_replay_it(recordings, recorder):
    for call in range(6):
        run(recordings, torch.full((3,), float(call)))
        assert recorder.recorded == (call >= 2)
        assert recorder.replayed == max(0, call - 1)


@pytest.mark.parametrize(
    ("x", "shift", "stream"),
    [
        (torch.ones(4), 1.0, 0),
        (torch.ones(3, dtype=torch.float64), 1.0, 0),
        (torch.ones(3), 2.0, 0),
        (torch.ones(3), 1.0, 1),
    ],
    ids=["shape", "dtype", "value", "stream"],
)
def test_inputs_of_another_form_have_a_recording_of_their_own(
    recordings, recorder, x, shift, stream
):
    for _ in range(4):
        run(recordings, torch.zeros(3))
        run(recordings, x, shift, stream)
    assert recorder.recorded == 2
    assert recorder.pools[0] is not recorder.pools[1] if stream else len(set(recorder.pools)) == 1


def test_without_memory_for_a_recording_all_are_freed(recorder):
    attempts = []

    def record(function: Any, inputs: Any, pool: Any) -> Any:
        attempts.append(inputs)
        if len(inputs[0]) > 3:
            raise torch.cuda.OutOfMemoryError
        return recorder(function, inputs, pool)

    recordings = Recordings(record, object)
    for _ in range(3):
        run(recordings, torch.zeros(3))
    assert recorder.replayed == 1
    for _ in range(10):
        run(recordings, torch.zeros(4))
        run(recordings, torch.zeros(5))
    assert len(attempts) == 2
    run(recordings, torch.zeros(3))
    assert recorder.replayed == 1


def test_forms_that_come_and_go_are_not_recorded_again_and_again(monkeypatch, recordings, recorder):
    monkeypatch.setattr("diptych.losses.base.tiles.replay._FORMS", 3)
    for _ in range(20):
        for length in (1, 2, 3, 4):
            for _ in range(3):
                run(recordings, torch.zeros(length))
    assert recorder.recorded == 3
    for _ in range(200):
        run(recordings, torch.zeros(4))
    assert recorder.recorded == 4


def test_on_a_cpu_every_call_is_a_call(monkeypatch, recordings, recorder):
    monkeypatch.setattr("diptych.losses.base.tiles.replay._recordings", recordings)
    for _ in range(5):
        assert replayed(doubled, torch.ones(3), 1.0)[0].equal(torch.full((3,), 3.0))
    assert not recorder.recorded
