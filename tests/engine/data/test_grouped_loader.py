"""Loaders whose batches are joined in groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from diptych.engine import SeededLoader, in_groups
from diptych.engine.data.batch_source import BatchSource
from diptych.engine.data.batches import batch_size
from tests.engine.loop.loops import EpochAware, Positioned, Tape, Unsized


@given(length=st.integers(1, 9), count=st.integers(1, 10), epochs=st.integers(1, 2))
def test_groups_hold_every_batch_once_in_order(length: int, count: int, epochs: int):
    loader = [{"x": torch.tensor([n, n]), "names": [str(n)] * 2} for n in range(length)]
    groups = in_groups(loader, count)
    assert len(groups) == -(-length // count)
    for _ in range(epochs):
        seen = list(groups)
        assert [int(n) for group in seen for n in group["x"]] == sorted([*range(length)] * 2)
        assert all(len(group["names"]) == len(group["x"]) for group in seen)
        assert [batch_size(group) for group in seen[:-1]] == [2 * count] * (len(seen) - 1)


def test_groups_of_a_loader_without_a_length_are_counted_by_the_run():
    groups = in_groups(Unsized([torch.ones(2)] * 5), 2)
    with pytest.raises(TypeError, match="has no length"):
        len(groups)
    loop = Tape()
    assert loop.run(groups, max_epochs=2).epoch_length == 3
    assert [len(batch) for *_, batch in loop.rows] == [4, 4, 2] * 2


def test_groups_pass_the_epoch_on_to_loader_sampler_or_batch_sampler():
    for name in ("itself", "sampler", "batch_sampler"):
        told = EpochAware([torch.ones(1)] * 2)
        owner = told if name == "itself" else Unsized([torch.ones(1)] * 2)
        setattr(owner, name, told)
        Tape().run(in_groups(owner, 2), max_epochs=3)
        assert told.told == [0, 1, 2]


@pytest.mark.parametrize("failing", range(6))
def test_a_group_that_could_not_be_read_is_read_again_as_a_whole(failing: int):
    class Counted(Positioned):
        def __iter__(self):
            return map(torch.tensor, ([n] for n in super().__iter__()))

    loader = Counted(6, {failing: OSError("no disk")})
    loop, groups = Tape(), in_groups(loader, 2)
    with pytest.raises(OSError, match="no disk"):
        loop.run(groups, max_epochs=1)
    loop.run(groups, max_epochs=1)
    assert [batch.tolist() for *_, batch in loop.rows] == [[0, 1], [2, 3], [4, 5]]


def test_groups_have_a_position_where_their_loader_has_one():
    groups = in_groups(SeededLoader(torch.arange(12), 2, shuffle=False), 2)
    again = in_groups(SeededLoader(torch.arange(12), 2, shuffle=False), 2)
    assert next(iter(groups)).tolist() == [0, 1, 2, 3]
    again.load_state_dict(groups.state_dict())
    assert next(iter(again)).tolist() == [4, 5, 6, 7]
    assert not hasattr(in_groups([], 2), "state_dict")


def test_groups_of_a_torch_loader_cover_the_data_set():
    loader = DataLoader(torch.arange(10), batch_size=3)
    assert [group.tolist() for group in in_groups(loader, 2)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_a_group_of_no_batch_is_refused(count: int):
    with pytest.raises(
        ValueError, match=f"count must be a whole number of batches >= 1, got {count}"
    ):
        in_groups([], count)


def test_two_passes_over_groups_have_a_position_each():
    groups = in_groups(SeededLoader(torch.arange(12), 2), 2)
    one, two = BatchSource(), BatchSource()
    for source, read in ((one, 1), (two, 2)):
        source.switch(groups)
        for _ in range(read):
            source.next(0)
    assert [source.position()["batch"] for source in (one, two)] == [2, 4]
    groups.load_state_dict(one.position())
    assert groups.state_dict() == one.position()
