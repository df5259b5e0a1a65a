"""The optional members of a loader: length, position, epoch, generators."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from diptych.engine import SeededLoader
from diptych.engine.data.loader_contract import (
    generator_states,
    has_position,
    length_of,
    position_getter,
    set_epoch,
    set_generator_states,
    takes_epoch,
)
from tests.engine.loop.loops import EpochAware, Positioned, Unsized


class Stream(IterableDataset):
    """An endless data set: its DataLoader has __len__ and no length."""

    def __iter__(self):
        yield from iter(int, 1)


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (None, None),
        ([1, 2], 2),
        (range(0), 0),
        (Unsized([1]), None),
        (DataLoader(Stream()), None),
        (DataLoader([1, 2, 3], batch_size=2), 2),
    ],
)
def test_the_length_is_known_or_none(data, length):
    assert length_of(data) == length


def test_only_the_outermost_that_can_is_told_the_epoch():
    class Loader:
        sampler = EpochAware("")
        batch_sampler = EpochAware("")

    set_epoch(Loader(), 3)
    assert (Loader.sampler.told, Loader.batch_sampler.told) == ([3], [])
    set_epoch([1, 2], 3)
    assert takes_epoch(Loader())
    assert not takes_epoch([1, 2])


class Wrapper:
    """A loader of a user's own, which passes everything on to another one."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)


def test_a_loader_has_a_position_if_it_can_save_one_and_go_there_also_through_a_wrapper():
    assert has_position(Positioned(3))
    assert has_position(Wrapper(Positioned(3)))
    assert not has_position(Wrapper([1, 2]))
    assert not has_position(torch.Generator())
    assert not has_position(None)


def test_an_iterator_with_a_position_of_its_own_is_asked_before_the_loader():
    loader = SeededLoader(torch.arange(6), 2)
    first, second = iter(loader), iter(loader)
    next(first), next(second), next(second)
    assert [position_getter(each, loader)()["batch"] for each in (first, second)] == [1, 2]
    plain = Positioned(3)
    batches = iter(plain)
    next(batches)
    assert position_getter(batches, plain)() == {"position": 1}


def test_the_generators_of_a_loader_and_its_sampler_are_saved_and_restored():
    data = DataLoader(range(9), shuffle=True, generator=torch.Generator().manual_seed(1))
    states = generator_states(data)
    order = list(data)
    set_generator_states(data, states)
    assert list(data) == order
    assert len(states) == 2
    assert generator_states([1, 2]) == []
