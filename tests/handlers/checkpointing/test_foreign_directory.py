"""A directory of checkpoints that somebody else made: nothing in it reaches outside of it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import tempfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.engine import CheckpointError
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from tests.handlers.checkpointing.test_store import entry, save, save_with_shards

NAMES = [
    "..",
    ".",
    "",
    "/",
    "../home",
    "../thesis.txt",
    "checkpoint_epoch_1.pt/../../thesis.txt",
    "checkpoint_epoch_1.shards/..",
    "..\\thesis.txt",
    "checkpoint_epoch_1.pt\n",
    "checkpoint_epoch_1.pt\0",
    "checkpoint_epoch_1.pt:stream",
    "checkpoint_epoch_٣.pt",
    "checkpoint_mine.pt",
    "checkpoint_epoch_" + "1" * 300 + ".pt",
    "notes.txt",
    "home",
]
"""Names that no checkpoint has. `home` is a symbolic link to the folder above."""

hostile = st.one_of(
    st.sampled_from(NAMES),
    st.text(max_size=40),
    st.text(st.sampled_from("./\\~:*? ab"), max_size=12),
    st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)).map("/".join),
)


def content(folder: Path) -> dict[str, bytes | None]:
    """Return every file in a folder by its path, and every folder and link with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        if path.is_file() and not path.is_symlink()
        else None
        for path in folder.rglob("*")
    }


@cache
def template() -> Path:
    """Return a folder with precious files and a store of two checkpoints inside it."""
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    (root / "thesis.txt").write_text("precious")
    store = CheckpointStore(root / "run")
    save_with_shards(store, 1)
    save(store, 2)
    (root / "run" / "home").symlink_to("..")
    (root / "run" / "notes.txt").write_text("mine")
    (root / "run" / "checkpoint_mine.pt").write_bytes(b"a copy")
    return root


def make_home(root: Path) -> CheckpointStore:
    """Return the store in a copy of the template."""
    shutil.copytree(template(), root, symlinks=True, dirs_exist_ok=True)
    return CheckpointStore(root / "run")


def rewrite_manifest(directory: Path, index: int, **change: Any) -> None:
    """Change an entry, with the right checksum, as somebody does who means harm."""
    path = directory / "manifest.json"
    listed = json.loads(path.read_text())["checkpoints"]
    listed[index].update(change)
    digest = zlib.crc32(json.dumps(listed, sort_keys=True).encode())
    path.write_text(json.dumps({"checkpoints": listed, "crc32": digest}))


def use(store: CheckpointStore) -> list[int]:
    """Open a store as a run does, save, and remove; return what it lists."""
    store.sweep()
    for number in (1, 2):
        for name in [listed.file for listed in store.entries()]:
            with contextlib.suppress(CheckpointError):
                store.read(name)
        save(store, 2 + number)
    return [listed.iteration for listed in store.entries()]


def outside(root: Path) -> dict[str, bytes | None]:
    """Return what is not the store's own: all beside its folder, and a user's files in it."""
    own = ("run/checkpoint_epoch", "run/manifest.json")
    return {path: held for path, held in content(root).items() if not path.startswith(own)}


@settings(max_examples=40, deadline=None)
@given(hostile, st.sampled_from([".unlisted", ".unfinished"]), st.booleans())
def test_a_mark_of_any_name_removes_nothing_else(name, ending, is_link):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = make_home(root)
        try:
            mark = root / "run" / (name + ending)
            mark.symlink_to(root) if is_link else mark.touch()
        except (OSError, ValueError):  # the file system has no such name
            return
        before = outside(root)
        assert use(CheckpointStore(store.directory)) == [3, 4]
        assert outside(root) == before


@settings(max_examples=40, deadline=None)
@given(hostile, st.sampled_from(["file", "shards"]), st.integers(0, 1))
def test_a_manifest_with_any_name_is_refused_and_nothing_is_removed(name, field, index):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = make_home(root)
        rewrite_manifest(store.directory, index, **{field: name})
        before = content(root)
        if (field, name) == ("shards", ""):
            return
        with pytest.raises(CheckpointError, match=r"manifest.json is not a manifest"):
            use(CheckpointStore(store.directory))
        assert content(root) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "checkpoint_epoch_2.pt"}, "listed 2 times"),
        ({"size": "12"}, "size has a value that it cannot have"),
        ({"crc32": None}, "crc32 has a value"),
        ({"iteration": 1.5}, "iteration has a value"),
        ({"metrics": {"loss": [1]}}, "metrics has a value"),
        ({"by_hand": 1}, "by_hand has a value"),
        ({"score": "best"}, "score has a value"),
    ],
)
def test_an_entry_with_a_value_that_no_checkpoint_has_is_named(tmp_path, change, message):
    store = make_home(tmp_path)
    rewrite_manifest(store.directory, 0, **change)
    with pytest.raises(CheckpointError, match=message):
        store.entries()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"checkpoints": 3}', '{"checkpoints": [3]}', "3"])
def test_a_manifest_of_another_kind_is_an_error_with_its_name(tmp_path, text):
    store = make_home(tmp_path)
    (store.directory / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest.json is not a manifest"):
        store.entries()


@settings(max_examples=40, deadline=None)
@given(hostile, st.sampled_from(["folder", "file", "chunk"]))
def test_a_checkpoint_that_names_any_other_file_is_refused(name, place):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = make_home(root)
        path = root / "run" / "checkpoint_epoch_1.pt"
        state = torch.load(path, weights_only=True)
        shards = state["shards"]
        if place == "folder":
            shards["folder"] = name
        elif place == "file":
            shards["files"][name] = shards["files"].pop("rank_0.tensors")
        else:
            chunk = [[0], [1], name, 0, 4]
            shards["tensors"] = {"model.a": {"shape": [1], "dtype": torch.uint8, "chunks": [chunk]}}
        other = root / "run" / "checkpoint_other.pt"  # not in the manifest, so without a checksum
        torch.save(state, other)
        before = content(root)
        with pytest.raises(CheckpointError, match=r"checkpoint_other.pt cannot be"):
            store.read(other.name)
        assert content(root) == before


@pytest.mark.parametrize(
    ("name", "checkpoint", "inside"),
    [
        ("checkpoint_epoch_2.pt", "checkpoint_epoch_2.pt", ""),
        ("checkpoint_epoch_1.shards", "checkpoint_epoch_1.pt", "rank_0.tensors"),
    ],
)
def test_a_listed_link_is_neither_read_nor_followed_to_remove(tmp_path, name, checkpoint, inside):
    store, target = make_home(tmp_path), tmp_path / "elsewhere"
    path = store.directory / name
    path.rename(target)
    path.symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{name} must not be a symbolic link"):
        store.read(checkpoint)
    store.remove({checkpoint})
    assert (target / inside).exists()


def test_a_manifest_that_is_a_link_is_not_read(tmp_path):
    store = make_home(tmp_path)
    path = store.directory / "manifest.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="it is a symbolic link"):
        store.entries()


def test_a_users_file_in_a_folder_of_shards_stays(tmp_path):
    store = make_home(tmp_path)
    notes = store.directory / "checkpoint_epoch_1.shards" / "notes.txt"
    notes.write_text("mine")
    store.remove({"checkpoint_epoch_1.pt"})
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]


def test_a_folder_with_the_name_of_a_checkpoint_stays(tmp_path):
    store = make_home(tmp_path)
    folder = store.directory / "checkpoint_epoch_9.pt"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (store.directory / "checkpoint_epoch_9.pt.unlisted").touch()
    (store.directory / "checkpoint_epoch_9.pt.unfinished").mkdir()
    assert use(store) == [3, 4]
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_link_where_a_checkpoint_is_about_to_be_written_is_not_followed(tmp_path):
    store = make_home(tmp_path)
    for ending in ("", ".unfinished"):
        (store.directory / f"checkpoint_epoch_3.pt{ending}").symlink_to(tmp_path / "thesis.txt")
    save(store, 3)
    assert store.read("checkpoint_epoch_3.pt")["value"][0] == 3
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_link_instead_of_a_mark_is_an_error_and_its_target_stays(tmp_path):
    store = make_home(tmp_path)
    (store.directory / "checkpoint_epoch_3.pt.unlisted").symlink_to(tmp_path / "new")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        save(store, 3)
    assert not (tmp_path / "new").exists()
    assert [listed.iteration for listed in store.entries()] == [1, 2]


def test_a_name_that_no_checkpoint_has_is_not_written(tmp_path):
    other = attrs.evolve(entry(1), file="../checkpoint_epoch_1.pt")
    with pytest.raises(CheckpointError, match="epoch must be a whole number of at most 20 digits"):
        CheckpointStore(tmp_path / "run").write(other, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["manifest.json", "manifest.json.unfinished"])
def test_a_pipe_instead_of_a_manifest_is_no_manifest_and_nobody_is_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    store = CheckpointStore(tmp_path)
    if name == "manifest.json":
        with pytest.raises(CheckpointError, match=r"manifest.json cannot be read: .* a pipe"):
            store.entries()
    else:
        assert store.entries() == []


def test_a_manifest_without_a_right_to_read_it_is_not_to_be_moved_away(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text("{}")

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read: .*rights") as caught:
        CheckpointStore(tmp_path).entries()
    assert "Move" not in str(caught.value)
