"""Fault records: batches of any type are written to a file and read back with weights_only."""

from __future__ import annotations

import dataclasses
import os
import random
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from diptych.engine.errors import CheckpointError
from diptych.handlers.loss_guard.fault_records import KIND, read_record, sample_ids, write_record
from tests.handlers.guarded import make_trainer, seeded_loader

Pair = namedtuple("Pair", ["image", "text"])


@attrs.frozen
class Sample:
    image: Tensor
    text: list[str]


@dataclasses.dataclass
class Labelled:
    image: Tensor
    label: int


def through_a_file(batch: Any, folder: Path) -> Any:
    path = folder / "record.pt"
    write_record(path, {"batch": batch, "terms": {}})
    torch.load(path, weights_only=True)
    return read_record(path)["batch"]


def test_mappings_lists_and_plain_values_come_back_as_they_were(tmp_path):
    batch = {
        "image": torch.randn(2, 3),
        "text": ["a cat", "a dog"],
        "pairs": [(torch.arange(2), 1.5), (None, True)],
        "nested": {"id": 7, "raw": b"ab"},
    }
    again = through_a_file(batch, tmp_path)
    assert torch.equal(again.pop("image"), batch.pop("image"))
    assert torch.equal(again["pairs"][0][0], batch["pairs"][0][0])
    assert again["pairs"][0][1] == 1.5
    assert again["pairs"][1] == (None, True)
    assert again["text"] == batch["text"]
    assert again["nested"] == batch["nested"]


@pytest.mark.parametrize(
    "batch",
    [
        Pair(torch.ones(2), torch.zeros(2)),
        Sample(torch.ones(2), ["a", "b"]),
        Labelled(torch.ones(2), 3),
    ],
)
def test_an_object_with_fields_comes_back_with_its_fields(batch, tmp_path):
    again = through_a_file(batch, tmp_path)
    assert type(again).__name__ == type(batch).__name__
    assert torch.equal(again.image, batch.image)
    assert isinstance(again, tuple) == isinstance(batch, tuple)
    if isinstance(batch, Sample):
        assert again.text == ["a", "b"]


def test_arrays_come_back_and_other_objects_become_their_repr(tmp_path):
    batch = {"x": np.arange(3.0), "names": np.array(["a", "b"]), "path": Path("a/b")}
    again = through_a_file(batch, tmp_path)
    assert np.array_equal(again["x"], batch["x"])
    assert again["names"] == ["a", "b"]
    assert again["path"] == repr(Path("a/b"))


def test_the_ids_of_a_seeded_loader_are_the_indices_that_it_read():
    trainer, loader = make_trainer(), seeded_loader()
    trainer.batches.switch(loader)
    seen = []
    for _ in range(3):
        batch = trainer.batches.next(0)
        assert next(iter(loader)) is not None  # somebody else reads
        ids = sample_ids(trainer, batch, "id")
        for index, image in zip(ids, batch["image"], strict=True):
            assert torch.equal(image.nan_to_num(), loader.dataset[index]["image"].nan_to_num())
        seen += ids
    assert len(set(seen)) == 18


def test_the_ids_are_unknown_without_a_key_and_a_seeded_loader():
    assert sample_ids(make_trainer(), {"image": torch.ones(2)}, "id") is None


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"record .* could not be written: .*No space left"):
        write_record(tmp_path / "record.pt", {"batch": 1, "terms": {}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), (b"x", "be read")])
def test_a_file_that_cannot_be_read_is_named(content, message, tmp_path):
    path = tmp_path / "record.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_record(path)


def test_another_file_of_tensors_is_refused(tmp_path):
    torch.save({"format": 1}, tmp_path / "record.pt")
    with pytest.raises(CheckpointError, match="is not a record of an update"):
        read_record(tmp_path / "record.pt")


def whole_record(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "record.pt"
    batch = {"x": torch.arange(200.0), "names": ["a", "b"]}
    write_record(path, {"batch": batch, "terms": {"a": torch.ones(1)}})
    return path, read_record(path)


def test_any_flipped_bit_is_reported_or_changes_nothing(tmp_path):
    path, whole = whole_record(tmp_path)
    content, chance, reported = path.read_bytes(), random.Random(3), 0
    for _ in range(300):
        at = chance.randrange(len(content))
        flipped = content[at] ^ 1 << chance.randrange(8)
        path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        try:
            found = read_record(path)
        except CheckpointError as error:
            reported += str(path) in str(error) and "Restore it from a copy" in str(error)
        else:
            assert torch.equal(found["batch"]["x"], whole["batch"]["x"])
            assert found["batch"]["names"] == ["a", "b"]
            assert torch.equal(found["terms"]["a"], torch.ones(1))
    assert reported > 200


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 0.99])
def test_a_record_that_was_cut_off_is_reported(tmp_path, share):
    path, _ = whole_record(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"record .*record\.pt cannot be read: .*Restore it"):
        read_record(path)


def test_a_record_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    path, _ = whole_record(tmp_path)
    compressed = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(compressed, "w") as bomb:
        for member in whole.namelist():
            bomb.writestr(member, whole.read(member), zipfile.ZIP_DEFLATED)
        bomb.writestr("record/data/99", bytes(1 << 24), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"bomb\.pt cannot be read: .*compressed"):
        read_record(compressed)
    torch.save({"batch": torch.zeros(1).expand(1 << 40), "terms": {}}, tmp_path / "wide.pt")
    with pytest.raises(CheckpointError, match=r"wide\.pt cannot be read: it unpacks to more than"):
        read_record(tmp_path / "wide.pt")


@pytest.mark.parametrize(
    "batch",
    [
        {KIND: "named tuple", "name": "a b", "fields": {"x": 1}},
        {KIND: "named tuple", "name": "A", "fields": {"_x": 1}},
        {KIND: "named tuple", "name": "A", "fields": {"x, **k: print(": 1}},
        {KIND: "data class", "name": "A", "fields": {"x: print() =": 1}},
        {KIND: "data class", "name": "A", "fields": {"class": 1}},
        {KIND: "data class", "name": "A", "fields": 7},
        {KIND: "data class"},
        {KIND: "array", "tensor": "x"},
    ],
)
def test_an_object_that_nobody_encoded_is_refused(tmp_path, batch):
    torch.save({"batch": batch, "terms": {}}, tmp_path / "record.pt")
    with pytest.raises(CheckpointError, match=r"record\.pt cannot be read: .*Restore it"):
        read_record(tmp_path / "record.pt")
