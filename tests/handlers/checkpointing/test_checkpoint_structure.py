"""A checkpoint with the right digests and another content is named and refused, and not loaded."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.engine import CheckpointError, ResumeError, Trainer
from diptych.engine.state.checkpoint_structure import check_archive, check_unpacked
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.sharded_tensors import check_index
from diptych.handlers.optimization.schedules import LearningRate
from diptych.handlers.sinks.jsonl import JsonLines
from tests.handlers.checkpointing.test_checkpoint_manager import digest, make_loader, make_trainer
from tests.handlers.checkpointing.test_store import state as small_state


def list_anew(path: Path) -> None:
    """Give the manifest the size and checksum that a file has now, as an earlier version did."""
    manifest = path.with_name("manifest.json")
    listed = json.loads(manifest.read_text())["checkpoints"]
    (own,) = (item for item in listed if item["file"] == path.name)
    own.update(size=path.stat().st_size, crc32=zlib.crc32(path.read_bytes()))
    manifest.write_text(json.dumps({"checkpoints": listed}))


def without(state: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    for name in parents:
        state = state[int(name) if name.isdecimal() else name]
    del state[int(last) if last.isdecimal() else last]


def replaced(state: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        state = state[int(name) if name.isdecimal() else name]
    state[int(last) if last.isdecimal() else last] = value


PARTS = [
    "model",
    "loss",
    "optimizer",
    "optimizer.state",
    "optimizer.param_groups",
    "optimizer.state.0",
    "optimizer.state.1.exp_avg",
    "optimizer.state.2.step",
    "trainer",
    "trainer.iteration",
    "trainer.epoch_iteration",
    "metrics",
    "metrics.0.window",
    "last_metrics",
    "handlers",
    "random",
    "random.0.python",
    "random.0.torch",
    "random.0.numpy.keys",
    "data",
    "saved",
    "saved.epoch",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """Return a directory with two checkpoints, and the weights after a third epoch."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    trainer = make_trainer()
    trainer.attach(CheckpointManager(directory))
    trainer.run(make_loader(), max_epochs=2)
    trainer.run(make_loader(), max_epochs=3)
    (directory / "checkpoint_epoch_3.pt").unlink()
    manifest = json.loads((directory / "manifest.json").read_text())["checkpoints"]
    (directory / "manifest.json").write_text(json.dumps({"checkpoints": manifest[:2]}))
    return directory, digest(trainer)


def copied(directory: Path, to: Path) -> Path:
    shutil.copytree(directory, to)
    return to / "checkpoint_epoch_2.pt"


@pytest.mark.parametrize("value", ["without", "a string", 3, None, [], {}])
@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_without_a_part_or_with_another_type_is_named_and_an_earlier_one_used(
    tmp_path, caplog, whole, part, value
):
    path = copied(whole[0], tmp_path / "run")
    state = torch.load(path, weights_only=True)
    found = state
    for name in part.split("."):
        found = found[int(name) if name.isdecimal() else name]
    if type(found) is type(value) and value != "without":
        pytest.skip("the part may be that")
    without(state, part) if value == "without" else replaced(state, part, value)
    torch.save(state, path)
    list_anew(path)
    trainer = make_trainer()
    trainer.attach(CheckpointManager(path.parent))
    trainer.run(make_loader(), max_epochs=3)
    refused = [message for message in caplog.messages if f"checkpoint {path} cannot be" in message]
    name = [name for name in part.split(".") if not name.isdecimal()]
    assert name[-1] in refused[0] or name[-2] in refused[0] or "random[0]" in refused[0]
    assert digest(trainer) == whole[1]


def refusal(trainer: Trainer) -> str:
    """Run; return the message with which the run refuses its checkpoint, "" if it does not."""
    try:
        trainer.run(make_loader(), max_epochs=3)
    except (CheckpointError, ResumeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "part",
    [
        "optimizer.param_groups.0.params.1",
        "identity",
        "current",
        "handlers.CheckpointManager.scored",
        "data.0.position",
        "parameters.0",
        "current.training",
    ],
)
@pytest.mark.parametrize("value", ["a string", None, []])
def test_a_part_inside_a_part_that_cannot_be_loaded_is_an_error_with_the_files_name(
    tmp_path, whole, part, value
):
    path = copied(whole[0], tmp_path / "run")
    state = torch.load(path, weights_only=True)
    replaced(state, part, value)
    torch.save(state, path)
    list_anew(path)
    trainer = make_trainer()
    trainer.attach(CheckpointManager(path.parent))
    assert str(path) in refusal(trainer) or digest(trainer) == whole[1]


def run_with_log(folder: Path, max_epochs: int) -> tuple[str, bytes]:
    """Run, or resume; return a digest of the weights, and the log."""
    trainer = make_trainer()
    manager = CheckpointManager(folder / "checkpoints")
    trainer.attach(JsonLines(folder), LearningRate(warmup=2, total=20), manager)
    trainer.run(make_loader(), max_epochs=max_epochs)
    return digest(trainer), (folder / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> tuple[Path, tuple[str, bytes]]:
    """Return the directory of a run of two epochs, and the end of one of three."""
    folder = tmp_path_factory.mktemp("logged")
    run_with_log(folder / "run", 2)
    return folder / "run", run_with_log(folder / "whole", 3)


@pytest.mark.parametrize("value", ["without", "a string", 3.5, None, []])
@pytest.mark.parametrize(
    "part",
    [
        "trainer.max_epochs",
        "trainer.completed",
        "handlers.JsonLines.values.size",
        "handlers.JsonLines.values",
        "handlers.LearningRate.total",
        "handlers.LearningRate",
        "handlers.CheckpointManager.scored",
        "data.0.position.batch",
        "data.0.given",
        "metrics.0.window.numbers",
        "current.training",
    ],
)
def test_what_a_handler_or_a_loader_had_saved_is_complete_or_an_earlier_checkpoint_is_used(
    tmp_path, caplog, logged, part, value
):
    shutil.copytree(logged[0], tmp_path / "run")
    path = tmp_path / "run/checkpoints/checkpoint_epoch_2.pt"
    state = torch.load(path, weights_only=True)
    without(state, part) if value == "without" else replaced(state, part, value)
    torch.save(state, path)
    list_anew(path)
    assert run_with_log(tmp_path / "run", 3) == logged[1]
    (refused,) = {text for text in caplog.messages if f"checkpoint {path} cannot be used" in text}
    assert f"{part} must be" in refused


def test_a_position_that_is_not_the_files_own_is_refused(tmp_path, whole):
    path = copied(whole[0], tmp_path / "run")
    state = torch.load(path, weights_only=True)
    state["trainer"]["iteration"] = 7
    torch.save(state, path)
    list_anew(path)
    with pytest.raises(CheckpointError, match=r"epoch_2.pt cannot be used: its iteration must be"):
        CheckpointStore(path.parent).read(path.name)


def test_what_a_checkpoint_holds_is_accepted(tmp_path, caplog, whole):
    path = copied(whole[0], tmp_path / "run")
    trainer = make_trainer()
    trainer.attach(CheckpointManager(path.parent))
    trainer.run(make_loader(), max_epochs=3)
    assert digest(trainer) == whole[1]
    assert not [message for message in caplog.messages if "cannot be" in message]


def compressed(path: Path) -> None:
    """Compress the members of an archive."""
    with zipfile.ZipFile(path) as archive:
        members = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_an_archive_with_compressed_members_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({**small_state(1), "value": torch.zeros(5_000_000)}, path)
    compressed(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"bomb.pt cannot be read: it has compressed members"):
        CheckpointStore(tmp_path).read(path.name)


def test_an_archive_whose_members_share_bytes_is_refused():
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a", b"0" * 1000)
        (member,) = archive.filelist
        archive.filelist.extend([member] * 9)
    size = len(held.getvalue())
    with pytest.raises(CheckpointError, match=f"it unpacks to 10000 bytes from {size}"):
        check_archive(held, size)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x05\x06" + bytes(18), b"PK\x03\x04"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.pt cannot be read"):
        CheckpointStore(tmp_path).read("a.pt")


def test_a_tensor_that_repeats_a_few_bytes_is_refused(tmp_path):
    torch.save({**small_state(1), "value": torch.zeros(1).expand(10**10)}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match=r"bomb.pt cannot be read: it unpacks to more than"):
        CheckpointStore(tmp_path).read("bomb.pt")


def test_lists_that_hold_each_other_twice_are_refused(tmp_path):
    value: Any = [1]
    for _ in range(60):
        value = [value, value]
    torch.save({**small_state(1), "value": value}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match="it unpacks to more than"):
        CheckpointStore(tmp_path).read("bomb.pt")


def test_a_tensor_without_data_is_refused(tmp_path):
    torch.save({**small_state(1), "value": torch.empty(3, device="meta")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a tensor without data"):
        CheckpointStore(tmp_path).read("a.pt")


def test_containers_that_are_nested_without_end_are_refused():
    value: Any = [1]
    for _ in range(100_000):
        value = [value]
    with pytest.raises(CheckpointError, match="nested more than"):
        check_unpacked(value, 10**6)
    while value:  # Python itself frees such a list recursively
        value = value[0] if isinstance(value[0], list) else None


def test_views_of_one_memory_and_shared_tensors_are_accepted():
    flat = torch.randn(1000)
    state = {"flat": flat, "parts": list(flat.split(10)), "tied": [flat] * 50}
    check_unpacked(state, 4000)


INDEX = {
    "shape": [4, 2],
    "dtype": torch.float32,
    "chunks": [
        [[0, 0], [3, 2], "rank_0.tensors", 0, 1000],
        [[3, 0], [1, 2], "rank_1.tensors", 0, 1000],
    ],
}
FILES = {"rank_0.tensors": [1000, 1], "rank_1.tensors": [1000, 2]}


def test_the_rows_of_a_sharded_tensor_are_all_there_once():
    state = {"model": {"a": {"diptych.shard": "model.a"}}}
    check_index(state, {"tensors": {"model.a": INDEX}, "files": FILES})
    with pytest.raises(CheckpointError, match=r"lacks the shards of model.a"):
        check_index(state, {"tensors": {}, "files": FILES})
    with pytest.raises(CheckpointError, match=r"lacks the shards of model.a"):
        check_index(state, None)


FIRST, SECOND = INDEX["chunks"]


@pytest.mark.parametrize(
    "change",
    [
        {"chunks": [FIRST]},
        {"chunks": [SECOND]},
        {"chunks": [FIRST, FIRST, SECOND]},
        {"chunks": [FIRST, [[2, 0], *SECOND[1:]]]},
        {"chunks": [[*FIRST[:2], "rank_7.tensors", 0, 1000], SECOND]},
        {"chunks": [[*FIRST[:3], 500, 1000], SECOND]},
        {"chunks": [[*FIRST[:3], -5, 10], SECOND]},
        {"chunks": [[*FIRST[:3], 0, 10], SECOND]},
        {"chunks": [[[0, 0], [3, 10**9], *FIRST[2:]], SECOND]},
        {"chunks": [[[0, 0], [3], *FIRST[2:]], SECOND]},
        {"chunks": [[0, 3, *FIRST[2:]], SECOND]},
        {"chunks": [["x"], SECOND]},
        {"chunks": 5},
        {"shape": [10**12, 2]},
        {"shape": [4, 10**12]},
        {"shape": [4, -2]},
        {"shape": []},
        {"shape": "ab"},
        {"dtype": "float32"},
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(change):
    with pytest.raises(CheckpointError, match=r"the shards of model.a are not all there"):
        check_index({}, {"tensors": {"model.a": {**INDEX, **change}}, "files": FILES})
