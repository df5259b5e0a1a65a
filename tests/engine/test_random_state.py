"""Random generators: read, stored, restored, and kept out of an onlooker's way."""

from __future__ import annotations

import copy
import random
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch

from diptych.engine.random_state import (
    SIZE,
    GeneratorSnapshot,
    forward_random_state,
    preserved_random_state,
    random_state,
    set_forward_random_state,
    set_random_state,
)
from tests.engine.models import stored


def draws() -> list[Any]:
    """Draw from every generator, a second normal number of a pair included."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.standard_normal()),
        torch.rand(3).tolist(),
        torch.randn(5).tolist(),
    ]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_state_in_a_file_continues_every_generator(before: int):
    for _ in range(before):
        draws()
    state = random_state()
    expected = draws(), draws()
    set_random_state(stored(state))
    assert (draws(), draws()) == expected


def test_a_state_that_was_read_does_not_follow_later_draws():
    state = random_state()
    first = draws()
    set_random_state(state)
    assert draws() == first
    set_random_state(state)
    assert draws() == first


def test_what_is_drawn_inside_does_not_show_outside_even_after_an_exception():
    state = random_state()
    expected = draws()
    set_random_state(state)
    with preserved_random_state():
        draws()
    with suppress(ValueError), preserved_random_state():
        draws()
        raise ValueError
    assert draws() == expected


def test_a_forward_pass_can_be_given_the_same_draws_again():
    device = torch.device("cpu")
    draws()
    state = forward_random_state(device)
    expected = draws()
    set_forward_random_state(state, device)
    assert draws() == expected


@pytest.mark.gpu
def test_the_draws_of_every_cuda_device_continue():
    def drawn() -> list[float]:
        return [torch.rand((), device=f"cuda:{n}").item() for n in range(torch.cuda.device_count())]

    drawn()
    state = stored(random_state())
    expected = drawn()
    set_random_state(state)
    assert drawn() == expected


def draws_on(device: str) -> list[object]:
    """Return draws of all generators, an odd number of normal ones among them."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(2).tolist(),
        torch.rand(2, device=device).tolist(),
    ]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("plain", [False, True], ids=["memory", "functions"])
def test_a_snapshot_gives_the_same_draws_again(plain, device, monkeypatch):
    if plain:  # of an interpreter whose generators have another layout
        monkeypatch.setattr("diptych.engine.random_state._reader_of", lambda _: lambda: bytes(SIZE))
    snapshot = GeneratorSnapshot(torch.device(device))
    for before in range(5):
        for _ in range(before):
            np.random.randn()
            random.gauss(0, 1)
            torch.rand(3, device=device)
        snapshot.take()
        expected = draws_on(device)
        draws_on(device)
        snapshot.restore()
        assert draws_on(device) == expected


def test_a_snapshot_follows_another_generator_of_numpy():
    earlier = np.random.get_bit_generator()
    snapshot = GeneratorSnapshot(torch.device("cpu"))
    try:
        for generator in (np.random.PCG64(1), np.random.MT19937(2), earlier):
            np.random.set_bit_generator(generator)
            snapshot.take()
            expected = np.random.rand(3).tolist()
            snapshot.restore()
            assert np.random.rand(3).tolist() == expected
    finally:
        np.random.set_bit_generator(earlier)


def test_a_snapshot_does_not_read_states_in_full_that_nothing_has_drawn_from(monkeypatch):
    np.random.seed(0)  # no normal number in reserve
    snapshot = GeneratorSnapshot(torch.device("cpu"))
    snapshot.take()
    read = []
    monkeypatch.setattr("random.getstate", lambda: read.append("python"))
    monkeypatch.setattr("numpy.random.get_state", lambda **_: read.append("numpy"))
    for _ in range(3):
        snapshot.take()
    assert read == []


def test_a_copy_of_a_snapshot_gives_the_same_draws_again():
    snapshot = GeneratorSnapshot(torch.device("cpu"))
    snapshot.take()
    expected = draws()
    copied = copy.deepcopy(snapshot)
    copied.restore()
    assert draws() == expected
    copied.take()
    expected = draws()
    copied.restore()
    assert draws() == expected
