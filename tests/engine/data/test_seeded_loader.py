"""The seeded loader: one order and one augmentation, whoever reads and however often it stops."""

from __future__ import annotations

import gc
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, Subset

from diptych.engine import ResumeError, SeededLoader, in_groups
from tests.losses.processes import printed


class Noisy(Dataset):
    """Draws from all three generators for every sample."""

    def __init__(self, count: int = 23) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, torch.rand(()).item(), float(np.random.rand()), random.random()


def samples(batches) -> list[tuple[float, ...]]:
    return [
        row for batch in batches for row in zip(*(part.tolist() for part in batch), strict=True)
    ]


def epoch(loader: SeededLoader, number: int) -> list[tuple[float, ...]]:
    loader.set_epoch(number)
    return samples(loader)


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own():
    loader = SeededLoader(Noisy(), 4)
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert sorted(row[0] for row in first) == list(range(23))
    assert [row[0] for row in first] != [row[0] for row in second]
    assert epoch(loader, 0) == first


def test_the_draws_of_a_sample_depend_on_seed_epoch_and_index_alone():
    by_index = {row[0]: row[1:] for row in epoch(SeededLoader(Noisy(), 4), 1)}
    rows = epoch(SeededLoader(Noisy(), 7, shuffle=False), 1)
    assert {row[0]: row[1:] for row in rows} == by_index
    assert len(set(by_index.values())) == 23
    other = {row[0]: row[1:] for row in epoch(SeededLoader(Noisy(), 4, seed=1), 1)}
    assert all(other[index] != by_index[index] for index in other)


def test_workers_change_nothing():
    alone = epoch(SeededLoader(Noisy(), 4), 2)
    assert epoch(SeededLoader(Noisy(), 4, num_workers=2), 2) == alone


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_pass_leaves_the_first_and_its_position_alone(workers: int):
    expected = epoch(SeededLoader(Noisy(), 5, seed=1), 3)
    loader = SeededLoader(Noisy(), 5, seed=1, num_workers=workers)
    loader.set_epoch(3)
    first = iter(loader)
    read = [next(first), next(first)]
    position = loader.state_dict()
    assert (position["epoch"], position["batch"]) == (3, 2)
    loader.set_epoch(0)
    second = samples(loader)
    assert second == epoch(SeededLoader(Noisy(), 5, seed=1), 0)
    assert loader.state_dict() == position
    read += first
    assert samples(read) == expected
    assert loader.state_dict()["batch"] == len(loader)


def test_reading_leaves_the_generators_of_the_process_alone():
    before = torch.get_rng_state().clone(), random.getstate(), np.random.get_state()[1].copy()
    epoch(SeededLoader(Noisy(), 4), 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


@given(stop=st.integers(0, 6), batch_size=st.integers(3, 9))
def test_a_position_continues_with_the_next_batch(stop: int, batch_size: int):
    loader = SeededLoader(Noisy(), batch_size)
    stop = min(stop, len(loader))
    whole = epoch(loader, 3)
    loader.set_epoch(3)
    iterator = iter(loader)
    head = samples(next(iterator) for _ in range(stop))
    position = loader.state_dict()
    resumed = SeededLoader(Noisy(), batch_size)
    resumed.load_state_dict(position)
    assert head + samples(resumed) == whole


def test_a_resumed_loader_reads_no_skipped_sample():
    class Counted(Noisy):
        read = 0

        def __getitem__(self, index: int):
            Counted.read += 1
            return super().__getitem__(index)

    loader = SeededLoader(Counted(), 5)
    loader.load_state_dict({**loader.state_dict(), "batch": 4})
    assert len(samples(loader)) == Counted.read == 3


@pytest.mark.parametrize("other", [{"seed": 1}, {"batch_size": 5}])
def test_a_position_of_another_order_is_refused(other):
    position = SeededLoader(Noisy(), 4).state_dict()
    with pytest.raises(ResumeError, match=next(iter(other))):
        SeededLoader(Noisy(), **{"batch_size": 4, **other}).load_state_dict(position)


def test_ranks_share_each_batch_in_order(monkeypatch):
    whole = [batch[0].tolist() for batch in SeededLoader(Noisy(22), 4)]
    shares = []
    for rank in range(2):
        monkeypatch.setattr("diptych.engine.data.seeded_loader.world_size", lambda: 2)
        monkeypatch.setattr("diptych.engine.data.seeded_loader.rank", lambda rank=rank: rank)
        shares.append([batch[0].tolist() for batch in SeededLoader(Noisy(22), 4)])
    assert [a + b for a, b in zip(*shares, strict=True)] == whole


def test_a_last_batch_too_small_for_the_ranks_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("diptych.engine.data.seeded_loader.world_size", lambda: 4)
    with pytest.raises(ValueError, match="a sample for each of 4 ranks, got 3"):
        SeededLoader(Noisy(23), 4)
    assert len(SeededLoader(Noisy(23), 4, drop_last=True)) == 5


def test_groups_of_a_seeded_loader_keep_its_position():
    whole = samples(in_groups(SeededLoader(Noisy(), 2), 3))
    loader = in_groups(SeededLoader(Noisy(), 2), 3)
    iterator = iter(loader)
    head = samples([next(iterator)])
    resumed = in_groups(SeededLoader(Noisy(), 2), 3)
    resumed.load_state_dict(loader.state_dict())
    assert head + samples(resumed) == whole


@pytest.mark.parametrize("size", [0, 2.5, True])
def test_a_batch_size_that_is_no_whole_number_is_refused(size):
    with pytest.raises(ValueError, match=f"batch_size must be a whole number >= 1, got {size}"):
        SeededLoader(Noisy(), size)


def test_a_data_set_smaller_than_a_batch_is_refused_with_drop_last():
    with pytest.raises(ValueError, match="fill one batch of 30, got 23"):
        SeededLoader(Noisy(), 30, drop_last=True)


# -- data sets that read several samples at once ---------------------------------------------------


class Table(Dataset):
    """Rows that can be read several at once; counts what is read, and how."""

    def __init__(self, draw=None) -> None:
        self.draw = draw or (lambda: 0.0)
        self.single = self.together = 0

    def __len__(self) -> int:
        return 23

    def row(self, index: int):
        row = np.arange(index, index + 3)
        return {"index": index, "row": row, "words": [str(index)], "draw": self.draw()}

    def __getitem__(self, index: int):
        self.single += 1
        return self.row(index)

    def __getitems__(self, indices: list[int]):
        self.together += 1
        return [self.row(index) for index in indices]


def plain(table: Table) -> Dataset:
    """Return the same data set without `__getitems__`."""

    class Plain(Dataset):
        __len__, __getitem__ = table.__len__, staticmethod(table.__getitem__)

    return Plain()


def rows(loader: SeededLoader) -> list[str]:
    """Return the batches of an epoch as texts."""
    loader.set_epoch(1)
    return [str(batch) for batch in loader]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_draws_nothing_is_read_a_batch_at_a_time(workers: int):
    table, expected = Table(), rows(SeededLoader(plain(Table()), 4))
    assert rows(SeededLoader(table, 4, num_workers=workers)) == expected
    if not workers:
        assert (table.single, table.together) == (4, 6)  # the first batch is read in both ways


def test_a_subset_of_such_a_data_set_is_read_a_batch_at_a_time_too():
    table = Table()
    part = Subset(table, range(3, 19))
    expected = rows(SeededLoader(Subset(plain(Table()), range(3, 19)), 4))
    assert rows(SeededLoader(part, 4)) == expected
    assert (table.single, table.together) == (4, 4)


DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "NumPy": np.random.normal,
    "Python": random.random,
    "the seed": lambda: np.random.default_rng(torch.initial_seed()).random(),
}
"""The ways to a random number, of which the last one moves no generator."""


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_a_sample_draws_stays_its_own_if_others_are_read_with_it(draw, caplog):
    caplog.set_level("INFO")
    table, expected = Table(draw), rows(SeededLoader(plain(Table(draw)), 4))
    assert rows(SeededLoader(table, 4)) == expected
    assert (table.single, table.together) == (23, 1)
    assert [record.message[:35] for record in caplog.records] == [
        "Reading the Table sample by sample,"
    ]


def test_a_draw_in_a_later_batch_is_found_in_every_order_of_reading():
    class Late(Table):
        def row(self, index: int):
            return {"index": index, "draw": random.random() if index == 11 else 0.0}

    expected = rows(SeededLoader(plain(Late()), 4))
    assert rows(SeededLoader(Late(), 4)) == expected
    resumed = SeededLoader(Late(), 4)
    resumed.load_state_dict({**resumed.state_dict(), "epoch": 1, "batch": 2})
    assert [str(batch) for batch in resumed] == expected[2:]


class Wrong(Table):
    """A table whose several rows are not its rows."""

    def __getitems__(self, indices: list[int]):
        if self.fault == "fails":
            raise OSError
        rows = super().__getitems__(indices)
        return {"fewer": rows[:1], "others": rows[::-1], "columns": {"index": indices}}[self.fault]


@pytest.mark.parametrize("fault", ["fails", "fewer", "others", "columns"])
def test_a_data_set_whose_batches_are_not_its_samples_is_read_sample_by_sample(fault):
    table, expected = Wrong(), rows(SeededLoader(plain(Table()), 4))
    table.fault = fault
    assert rows(SeededLoader(table, 4)) == expected
    assert table.single == 23


def test_the_workers_of_an_abandoned_pass_end_with_the_loader_and_no_cycle_keeps_them():
    loader = SeededLoader(Noisy(), 4, num_workers=1)
    iterator = iter(loader)
    next(iterator)
    (worker,) = loader._loader._iterator._workers
    gc.disable()
    try:
        del loader, iterator
        assert not worker.is_alive()
    finally:
        gc.enable()


def test_workers_have_ended_when_python_exits_and_what_was_registered_earlier_runs():
    code = """
import atexit
from diptych.engine import SeededLoader
loader = SeededLoader([1, 2, 3], 1, num_workers=2)
atexit.register(lambda: print([worker.is_alive() for worker in workers]))
assert len(list(loader)) == 3
workers = loader._loader._iterator._workers
"""
    assert printed(code) == "[False, False]"


class Collecting(Dataset):
    """A data set that collects garbage, as any code in a worker may."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


def allocate_in_workers() -> None:
    """Make Python collect, if it does so by itself, as soon as a worker has started."""
    if allocating:
        gc.set_threshold(1)
        _ = [[] for _ in range(1000)]


allocating: list[bool] = []
os.register_at_fork(after_in_child=allocate_in_workers)


def test_a_worker_leaves_the_garbage_of_its_parent_alone(tmp_path):
    class Note:
        def __del__(self):
            (tmp_path / str(os.getpid())).touch()

    gc.collect()
    thresholds = gc.get_threshold()
    gc.set_threshold(10**9)
    allocating.append(True)
    try:
        note = Note()
        note.cycle = note
        del note
        list(SeededLoader(Collecting(), 2, num_workers=1))
    finally:
        allocating.clear()
        gc.set_threshold(*thresholds)
    assert gc.isenabled()
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [str(os.getpid())]
