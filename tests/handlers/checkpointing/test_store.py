"""A folder of checkpoints: no kill and no damage loses an earlier one."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import attrs
import pytest
import torch

from diptych.engine import CheckpointError
from diptych.engine.random_state import random_state
from diptych.handlers import verified_files
from diptych.handlers.checkpointing import checkpoint_store
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.entries import Entry
from diptych.handlers.verified_files import size_and_crc32


def state(value: int) -> dict[str, object]:
    """Return the smallest state that is one of a run."""
    return {
        "format": 1,
        "value": torch.full((50,), value),
        "model": {},
        "loss": {},
        "optimizer": {"state": {}, "param_groups": [{"params": []}]},
        "trainer": {"iteration": value, "epoch": 1, "epoch_iteration": 0, "epoch_length": None},
        "metrics": [{"window": {}, "epoch": {}, "history": {}}],
        "last_metrics": {},
        "handlers": {},
        "random": [random_state()],
        "data": [None],
        "saved": {"epoch": 1, "metrics": {}},
    }


def entry(iteration: int) -> Entry:
    return Entry(file=f"checkpoint_epoch_{iteration}.pt", epoch=1, iteration=iteration, metrics={})


def save(store: CheckpointStore, iteration: int) -> None:
    store.write(entry(iteration), state(iteration))
    store.remove({e.file for e in store.entries()[:-2]})


def save_with_shards(store: CheckpointStore, iteration: int) -> None:
    folder = store.new_folder(entry(iteration))
    path = store.directory / folder
    path.mkdir()
    (path / "rank_0.tensors").write_bytes(b"rows")
    digest = list(size_and_crc32(path / "rank_0.tensors"))
    shards = {"folder": folder, "files": {"rank_0.tensors": digest}, "tensors": {}}
    named = attrs.evolve(entry(iteration), shards=folder)
    store.write(named, {**state(iteration), "shards": shards})
    store.remove({e.file for e in store.entries()[:-2]})


class Killed(BaseException):
    """Simulates the end of the process."""


FILE_OPERATIONS = [
    (os, "fsync"),
    (Path, "replace"),
    (Path, "touch"),
    (Path, "unlink"),
    (Path, "rmdir"),
    (verified_files, "size_and_crc32"),
]


def kill_at(monkeypatch, operation: int, *, after: bool) -> list[int]:
    """End the process just before, or just after, the given operation on files."""
    count = [0]

    def wrapped(function):
        def call(*args, **kwargs):
            count[0] += 1
            # A killed process does nothing more: no cleanup runs either.
            if count[0] > operation or (count[0] == operation and not after):
                raise Killed
            result = function(*args, **kwargs)
            if count[0] == operation:
                raise Killed
            return result

        return call

    for owner, name in FILE_OPERATIONS:
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    return count


def test_a_file_is_durable_before_a_manifest_lists_it(tmp_path, monkeypatch):
    done: list[str] = []

    def record(owner, name, label):
        function = getattr(owner, name)

        def call(path, *rest):
            done.append(label(path))
            return function(path, *rest)

        monkeypatch.setattr(owner, name, call)

    record(Path, "replace", lambda path: f"rename {path.name.removesuffix('.unfinished')}")
    record(checkpoint_store, "flush_folder", lambda path: f"flush {path.name}")
    save(CheckpointStore(tmp_path / "run"), 1)

    assert done == [
        "rename checkpoint_epoch_1.pt",
        "flush run",
        "rename manifest.json",
        "flush run",
    ]


@pytest.mark.parametrize("save", [save, save_with_shards])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_operation_of_a_save_leaves_the_earlier_checkpoints_intact(
    tmp_path, monkeypatch, after, save
):
    operation = 0
    finished = False
    while not finished:
        operation += 1
        folder = tmp_path / str(operation)
        store = CheckpointStore(folder)
        for iteration in (1, 2, 3):
            save(store, iteration)
        with monkeypatch.context() as patch:
            count = kill_at(patch, operation, after=after)
            with contextlib.suppress(Killed):
                save(store, 4)
            finished = count[0] < operation

        again = CheckpointStore(folder)
        again.sweep()
        listed = [e.iteration for e in again.entries()]
        assert listed in ([2, 3], [2, 3, 4], [3, 4])
        for iteration in listed:
            assert again.read(f"checkpoint_epoch_{iteration}.pt")["value"][0] == iteration
        files = {path.name for path in folder.iterdir()}
        ends = (".pt", ".shards") if save is save_with_shards else (".pt",)
        assert files == {
            "manifest.json",
            *(f"checkpoint_epoch_{i}{end}" for i in listed for end in ends),
        }
    assert operation > 10


def test_replacing_a_checkpoint_removes_its_folder(tmp_path):
    store = CheckpointStore(tmp_path)
    for _ in range(2):
        save_with_shards(store, 1)
    assert store.read("checkpoint_epoch_1.pt")["value"][0] == 1
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"manifest.json", "checkpoint_epoch_1_again.pt", "checkpoint_epoch_1.shards_2"}


@pytest.mark.parametrize("save", [save, save_with_shards])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_while_a_checkpoint_is_written_again_leaves_it_intact(
    tmp_path, monkeypatch, after, save
):
    operation, finished = 0, False
    while not finished:
        operation += 1
        folder = tmp_path / str(operation)
        store = CheckpointStore(folder)
        save(store, 1)
        with monkeypatch.context() as patch:
            count = kill_at(patch, operation, after=after)
            with contextlib.suppress(Killed):
                save(store, 1)
            finished = count[0] < operation

        again = CheckpointStore(folder)
        again.sweep()
        assert [entry.iteration for entry in again.entries()] == [1]
        assert again.read("checkpoint_epoch_1.pt")["value"][0] == 1
        ends = sorted(path.suffix.partition("_")[0] for path in folder.iterdir())
        assert ends == [".json", ".pt", *([".shards"] if save is save_with_shards else [])]
    assert operation > 8


def test_a_checkpoint_written_again_is_found_under_its_plain_name(tmp_path):
    store = CheckpointStore(tmp_path)
    for _ in range(3):
        save(store, 1)
        assert store.read("checkpoint_epoch_1.pt")["value"][0] == 1
        assert len(list(tmp_path.glob("*.pt"))) == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_of_a_folder_is_named(tmp_path, damage):
    store = CheckpointStore(tmp_path)
    save_with_shards(store, 1)
    share = tmp_path / "checkpoint_epoch_1.shards" / "rank_0.tensors"
    if damage == "gone":
        share.unlink()
    else:
        share.write_bytes(b"rowt" if damage == "flipped" else b"row")
    with pytest.raises(CheckpointError, match=r"_1.shards/rank_0.tensors (is damaged|cannot be)"):
        store.read("checkpoint_epoch_1.pt")


def test_the_shards_of_a_failed_save_are_removed(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    save_with_shards(store, 1)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_with_shards(store, 2)
    assert [path.name for path in tmp_path.glob("checkpoint_epoch_2*")] == []
    assert store.read("checkpoint_epoch_1.pt")["value"][0] == 1


def test_a_kill_in_the_first_save_leaves_an_empty_folder(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as patch:
        kill_at(patch, 6, after=True)  # renamed, and not in the manifest yet
        with pytest.raises(Killed):
            save(store, 1)
    assert (tmp_path / "checkpoint_epoch_1.pt").exists()
    store.sweep()
    assert list(tmp_path.glob("*.pt*")) == []
    assert store.entries() == []


def test_a_file_that_a_user_copied_into_the_folder_stays(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    copy = tmp_path / "checkpoint_copied.pt"
    copy.write_bytes((tmp_path / "checkpoint_epoch_1.pt").read_bytes())
    store.sweep()
    assert store.unlisted() == [copy]
    assert store.read(copy.name)["value"][0] == 1


def test_a_file_that_reads_back_differently_is_not_a_checkpoint(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    flush = os.fsync

    def flip_a_bit(descriptor: int) -> None:
        flush(descriptor)
        path = tmp_path / "checkpoint_epoch_2.pt.unfinished"
        if path.exists():
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    monkeypatch.setattr(os, "fsync", flip_a_bit)
    with pytest.raises(CheckpointError, match=r"checkpoint_epoch_2.pt.*its content differs"):
        save(store, 2)
    assert [e.iteration for e in store.entries()] == [1]
    assert not list(tmp_path.glob("checkpoint_epoch_2*"))


@pytest.mark.parametrize("place", [0.02, 0.3, 0.7, 0.98])
def test_one_flipped_bit_anywhere_is_noticed(tmp_path, place):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    path = tmp_path / "checkpoint_epoch_1.pt"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 16
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint_epoch_1.pt is damaged"):
        store.read("checkpoint_epoch_1.pt")


@pytest.mark.parametrize("text", ["{", "[]", '{"checkpoints": [{"file": "a.pt"}]}'])
def test_a_broken_manifest_is_an_error_with_a_remedy_and_nothing_is_removed(tmp_path, text):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest.json.*Move it away, and resume from"):
        store.entries()
    assert (tmp_path / "checkpoint_epoch_1.pt").exists()


def test_the_manifest_lists_size_and_digest_of_each_file(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (listed,) = json.loads((tmp_path / "manifest.json").read_text())["checkpoints"]
    assert listed["size"] == (tmp_path / "checkpoint_epoch_1.pt").stat().st_size
    assert listed["file"] == "checkpoint_epoch_1.pt"


@pytest.mark.parametrize("name", ["missing.pt", "text.pt", "tensor.pt"])
def test_a_file_that_is_not_a_checkpoint_is_named(tmp_path, name):
    (tmp_path / "text.pt").write_text("hello")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match=name):
        CheckpointStore(tmp_path).read(name)
