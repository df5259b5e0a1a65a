"""Checkpoints on file systems as they are, and what a kill or a change leaves in a directory."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import zlib
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from safetensors.torch import load_file, save_file

from diptych.engine import CheckpointError
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from tests.handlers.checkpointing.test_checkpoint_manager import digest, make_loader, make_trainer
from tests.handlers.checkpointing.test_store import Killed, save


def run(directory: Path, epochs: int, *, stop: int | None = None, **settings) -> str:
    """Run with a manager, up to a stop; return the digest of the weights."""
    trainer = make_trainer()
    trainer.attach(CheckpointManager(directory, **settings))
    if stop is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), trainer.terminate)
    trainer.run(make_loader(), max_epochs=epochs)
    return digest(trainer)


def iterations(directory: Path) -> list[int]:
    return [entry.iteration for entry in CheckpointStore(directory).entries()]


def files(directory: Path, ending: str = ".pt") -> list[str]:
    return sorted(path.name for path in directory.iterdir() if ending in path.name)


# -- file systems ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["fsync", "open"])
def test_saves_count_where_a_folder_cannot_be_flushed_and_that_is_logged_once(
    tmp_path, monkeypatch, caplog, at
):
    flush, open_ = os.fsync, os.open

    def fsync(descriptor: int) -> None:
        if at == "fsync" and stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    def opened(path, *rest, **options):
        if at == "open" and Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_(path, *rest, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "open", opened)
    run(tmp_path / "run", 4, keep=2)
    assert len([message for message in caplog.messages if "cannot flush" in message]) == 1
    assert not [message for message in caplog.messages if "could not be written" in message]
    assert files(tmp_path / "run") == ["checkpoint_epoch_3.pt", "checkpoint_epoch_4.pt"]


class Renaming:
    """Renames as a file system does whose renames are a copy and a deletion; dies in one of them.

    Attributes:
        dies_in: the number of the rename in which the process is killed.
        removes_first: whether the old file is removed, instead of overwritten bit by bit.
    """

    def __init__(self, dies_in: int, *, removes_first: bool) -> None:
        self.dies_in, self.removes_first = dies_in, removes_first
        self.count = 0

    def __call__(self, source: Path, target: Path) -> Path:
        self.count += 1
        content = source.read_bytes()
        if self.removes_first:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)  # noqa: PTH108 - Path.unlink is killed too
            if self.count == self.dies_in:
                raise Killed
        elif self.count == self.dies_in:
            target.write_bytes(content[: len(content) // 2])
            raise Killed
        target.write_bytes(content)
        os.unlink(source)  # noqa: PTH108
        return target


@pytest.mark.parametrize("removes_first", [False, True])
@pytest.mark.parametrize("dies_in", range(1, 7))
def test_a_kill_in_a_rename_that_is_not_atomic_loses_no_earlier_checkpoint(
    tmp_path, monkeypatch, dies_in, removes_first
):
    store = CheckpointStore(tmp_path)
    for number in (1, 2):
        save(store, number)
    rename = Renaming(dies_in, removes_first=removes_first)

    def dead(*_: object, **__: object) -> None:
        if rename.count >= rename.dies_in:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *paths: rename(*paths))  # noqa: PLW0108 - bound
        unlink = Path.unlink
        patch.setattr(Path, "unlink", lambda path, **options: dead() or unlink(path, **options))
        with contextlib.suppress(Killed):
            for number in (3, 4):
                save(store, number)
    assert rename.count == dies_in
    again = CheckpointStore(tmp_path)
    again.sweep()
    listed = [entry.iteration for entry in again.entries()]
    assert listed in ([1, 2], [1, 2, 3], [2, 3], [2, 3, 4], [3, 4])
    for number in listed:
        assert again.read(f"checkpoint_epoch_{number}.pt")["value"][0] == number
    assert files(tmp_path) == [f"checkpoint_epoch_{number}.pt" for number in listed]
    for number in (5, 6):
        save(again, number)
    assert [entry.iteration for entry in again.entries()] == [5, 6]
    assert files(tmp_path, ".unfinished") == []


def test_a_lost_manifest_is_read_from_the_unfinished_one_and_that_is_logged(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    (tmp_path / "manifest.json").rename(tmp_path / "manifest.json.unfinished")
    assert iterations(tmp_path) == [1]
    assert "manifest.json is lost or damaged" in caplog.text
    save(CheckpointStore(tmp_path), 2)
    assert iterations(tmp_path) == [1, 2]


def test_half_of_an_unfinished_manifest_is_not_read(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text("{")
    (tmp_path / "manifest.json.unfinished").write_text(text[:-9])
    with pytest.raises(CheckpointError, match=r"manifest.json is not a manifest"):
        store.entries()


# -- kills -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"background": True}])
def test_a_kill_before_tidying_leaves_no_checkpoint_beyond_keep_after_the_next_start(
    tmp_path, monkeypatch, settings
):
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "remove", lambda *_: None)
        run(tmp_path, 3, keep=1, **settings)
    assert len(files(tmp_path)) == 3
    run(tmp_path, 3, keep=1)  # it is finished, and trains nothing
    assert files(tmp_path) == ["checkpoint_epoch_3.pt"]


def test_a_kill_before_tidying_leaves_nothing_in_the_directory_of_a_second_manager(
    tmp_path, monkeypatch
):
    def both() -> None:
        trainer = make_trainer()
        trainer.attach(
            CheckpointManager(tmp_path / "a", keep=1),
            CheckpointManager(tmp_path / "b", keep=2, best="train/loss", mode="min"),
        )
        trainer.run(make_loader(), max_epochs=4)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "remove", lambda *_: None)
        both()
    assert [len(files(tmp_path / name)) for name in "ab"] == [4, 4]
    both()
    assert files(tmp_path / "a") == ["checkpoint_epoch_4.pt"]
    assert len(files(tmp_path / "b")) in {2, 3}


@pytest.mark.parametrize("keep", [1, 2])
def test_after_a_damaged_latest_checkpoint_the_one_before_it_is_kept(tmp_path, monkeypatch, keep):
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "remove", lambda *_: None)
        run(tmp_path, 3, keep=keep)
    (tmp_path / "checkpoint_epoch_3.pt").write_bytes(b"damaged")
    run(tmp_path, 2, keep=keep)  # it has trained these, and saves nothing
    assert "checkpoint_epoch_2.pt" in files(tmp_path)
    assert run(tmp_path, 4, keep=keep) == run(tmp_path / "whole", 4)


# -- changes -----------------------------------------------------------------------------------


def test_a_changed_manifest_is_named_and_its_values_come_from_the_checkpoints(tmp_path, caplog):
    run(tmp_path, 3)
    path = tmp_path / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"iteration": 6', '"iteration": 96'))
    assert iterations(tmp_path) == [96, 12, 18]
    assert "manifest.json has been changed since it was written" in caplog.text
    CheckpointStore(tmp_path).sweep()
    assert path.read_text() == text


def test_a_changed_manifest_loses_an_entry_whose_file_it_does_not_fit(tmp_path, caplog):
    run(tmp_path, 3)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["checkpoints"][1]["size"] += 1
    path.write_text(json.dumps(content))
    CheckpointStore(tmp_path).sweep()
    assert iterations(tmp_path) == [6, 18]
    assert "checkpoint_epoch_2.pt is damaged" in caplog.text
    assert "It is taken out of manifest.json" in caplog.text
    assert (tmp_path / "checkpoint_epoch_2.pt").exists()
    assert "checkpoint_epoch_2.pt is not in manifest.json, and is ignored" in caplog.text


def test_a_manifest_of_an_earlier_version_has_no_checksum_and_is_read(tmp_path, caplog):
    run(tmp_path, 2)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"checkpoints": content["checkpoints"]}))
    caplog.clear()
    run(tmp_path, 3)
    assert "changed" not in caplog.text
    again = json.loads(path.read_text())
    text = json.dumps(again["checkpoints"], sort_keys=True).encode()
    assert again["crc32"] == zlib.crc32(text)


def test_exported_weights_that_have_changed_are_exported_again(tmp_path, caplog):
    run(tmp_path, 2, export=True)
    path = tmp_path / "model.safetensors"
    intact = {key: value.clone() for key, value in load_file(path).items()}
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    run(tmp_path, 2, export=True)
    assert "model.safetensors are not those that were exported" in caplog.text
    again = load_file(path)
    assert intact.keys() == again.keys()
    assert all(torch.equal(intact[key], again[key]) for key in intact)


def test_a_path_that_a_user_gives_may_be_a_link_and_its_checksum_counts(tmp_path):
    run(tmp_path / "a", 1)
    link = tmp_path / "latest.pt"
    link.symlink_to(tmp_path / "a" / "checkpoint_epoch_1.pt")
    assert run(tmp_path / "b", 2, resume=link) == run(tmp_path / "whole", 2)
    content = bytearray(link.read_bytes())
    content[len(content) // 2] ^= 1
    link.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint_epoch_1.pt is damaged"):
        run(tmp_path / "c", 2, resume=link)


def test_a_directory_that_cannot_be_tidied_is_an_error_that_names_it(tmp_path, monkeypatch):
    run(tmp_path, 1)
    (tmp_path / "checkpoint_epoch_2.pt.unfinished").touch()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CheckpointError, match=r"could not be tidied: .*Permission denied"):
        run(tmp_path, 2)


def test_exported_weights_are_not_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "precious.safetensors")
    before = (tmp_path / "precious.safetensors").read_bytes()
    for ending in ("", ".unfinished"):
        link = tmp_path / "run" / f"model.safetensors{ending}"
        link.symlink_to(tmp_path / "precious.safetensors")
    run(tmp_path / "run", 1, export=True)
    assert (tmp_path / "precious.safetensors").read_bytes() == before
    assert not (tmp_path / "run" / "model.safetensors").is_symlink()


def test_an_epoch_with_a_name_that_is_too_long_is_refused(tmp_path):
    trainer, manager = make_trainer(), CheckpointManager(tmp_path)
    trainer.attach(manager)
    with pytest.raises(CheckpointError, match="epoch must be a whole number of at most 20 digits"):
        manager.save_checkpoint(10**250, {})
    assert manager.save_checkpoint(10**19, {}).is_file()
