"""The batches of a run: the place in a loader, and the epoch that the loader is told."""

from __future__ import annotations

import contextlib

import pytest
import torch

from diptych.engine import ResumeError, SeededLoader
from diptych.engine.data.batch_source import BatchSource
from tests.engine.loop.loops import EpochAware, Positioned, Unsized


def test_a_source_gives_the_passes_one_after_the_other():
    source = BatchSource()
    source.switch("ab")
    for _ in range(2):
        assert not source.keeps_its_place
        assert [source.next(0), source.next(0)] == ["a", "b"]
        assert source.keeps_its_place
        with pytest.raises(StopIteration):
            source.next(0)


def test_switching_to_the_same_loader_keeps_the_place_and_to_another_begins_it():
    source, data = BatchSource(), ["a", "b"]
    source.switch(data)
    assert source.next(0) == "a"
    source.switch(data)
    assert source.next(0) == "b"
    source.switch(["a", "b"])
    assert source.next(0) == "a"


def test_rewinding_begins_a_new_pass():
    source = BatchSource()
    source.switch("ab")
    assert source.next(0) == "a"
    source.rewind()
    assert source.next(0) == "a"


def test_a_position_is_restored_in_another_source():
    source, other = BatchSource(), BatchSource()
    source.switch(Positioned(5))
    assert [source.next(0) for _ in range(3)] == [0, 1, 2]
    other.switch(Positioned(5))
    other.restore(source.position())
    assert other.keeps_its_place
    assert [other.next(0) for _ in range(2)] == [3, 4]


def test_a_loader_without_a_position_has_none_and_takes_none():
    source = BatchSource()
    source.switch(Unsized([1, 2]))
    assert source.position() is None
    with pytest.raises(ResumeError, match=r"needs a loader with load_state_dict\(\), got Unsized"):
        source.restore({"position": 1})


@pytest.mark.parametrize("batches", [[0, 1, 2, 3], (0, 1, 2, 3), range(4)])
@pytest.mark.parametrize("done", range(9))
def test_a_list_of_batches_has_a_position(batches, done):
    whole = [*batches, *batches, *batches]

    def read(source: BatchSource, number: int) -> list[int]:
        taken = []
        while len(taken) < number:
            with contextlib.suppress(StopIteration):
                taken.append(source.next(0))
        return taken

    source, other = BatchSource(), BatchSource()
    source.switch(batches)
    assert read(source, done) == whole[:done]
    place = source.place()
    other.switch(type(batches)(batches) if not isinstance(batches, range) else range(4))
    other.restore_place(place, inside=bool(done % 4))

    assert read(other, 3) == whole[done : done + 3]
    assert read(source, 3) == whole[done : done + 3]


def test_a_subclass_of_list_iterates_in_its_own_way_and_has_no_position():
    class Backwards(list):
        def __iter__(self):
            return reversed(self)

    source = BatchSource()
    source.switch(Backwards([1, 2]))
    assert not source.has_positions
    assert source.next(0) == 2


def test_a_restored_loader_is_not_told_its_epoch_since_that_would_rewind_it():
    class Both(Positioned, EpochAware):
        def __init__(self, length: int) -> None:
            Positioned.__init__(self, length)
            self.told = []

    data, source = Both(3), BatchSource()
    source.switch(data)
    source.restore({"position": 2})
    assert source.next(4) == 2
    assert data.told == []
    with pytest.raises(StopIteration):
        source.next(4)
    assert source.next(5) == 0
    assert data.told == [5]


class Shuffled:
    """A loader with a state, as torchdata's: its order is drawn when it is iterated."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.pending: dict[str, object] | None = None

    def __iter__(self):
        torch.rand(())  # a draw from the run's own generator, once a pass
        if self.pending is None:
            start, done = self.generator.get_state(), 0
        else:
            start, done = self.pending["start"], self.pending["done"]
            self.generator.set_state(start)
        self.pending = None
        order = torch.randperm(5, generator=self.generator).tolist()
        self.state = {"start": start, "done": done}
        return self._rest(order)

    def _rest(self, order):
        for index in order[self.state["done"] :]:
            self.state["done"] += 1
            yield index

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        self.pending = dict(state)


@pytest.mark.parametrize("done", [1, 3, 5])
def test_a_place_inside_a_pass_or_at_its_end_goes_on_with_the_same_order_and_draws(done):
    def step(source):
        try:
            batch = source.next(0)
        except StopIteration:
            batch = source.next(0)
        return batch, torch.rand(()).item()

    def read(source, count):
        return [step(source) for _ in range(count)]

    torch.manual_seed(0)
    source, other = BatchSource(), BatchSource()
    source.switch(Shuffled())
    read(source, done)
    place, drawn = source.place(), torch.get_rng_state()
    if done == 5:
        source.rewind()
    expected = read(source, 9)
    other.switch(Shuffled())
    other.restore_place(place, inside=done < 5)
    torch.set_rng_state(drawn)
    assert read(other, 9) == expected


def test_two_sources_over_one_loader_have_a_position_each():
    loader, one, two = SeededLoader(torch.arange(10), 2), BatchSource(), BatchSource()
    for source, read in ((one, 1), (two, 3)):
        source.switch(loader)
        for _ in range(read):
            source.next(0)
    assert [source.position()["batch"] for source in (one, two)] == [1, 3]


def test_a_restored_place_survives_others_that_read_the_loader_before_the_next_batch():
    source, other, loader = BatchSource(), BatchSource(), SeededLoader(torch.arange(10), 2)
    source.switch(SeededLoader(torch.arange(10), 2))
    source.next(4)
    other.switch(loader)
    other.restore_place(source.place(), inside=True)
    loader.set_epoch(0)
    assert len(list(loader)) == 5
    assert other.position() == source.position()
    assert torch.equal(other.next(4), source.next(4))


def test_a_loader_without_a_length_is_at_its_end_where_the_pass_before_ended():
    source, other, data = BatchSource(), BatchSource(), Unsized("abc")
    source.switch(data)
    assert [source.next(0) for _ in "abc"] == [*"abc"]
    with pytest.raises(StopIteration):
        source.next(0)
    for _ in "abc":
        source.next(1)
    other.switch(data)
    other.restore_place(source.place(), inside=False)
    assert not other.lost_its_place
    other.next(2)
    other.restore_place(other.place(), inside=False)
    assert other.lost_its_place
