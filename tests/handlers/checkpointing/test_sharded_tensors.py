"""Shards on the disk: their layout, and files that torch's distributed checkpoint wrote."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint

from diptych.handlers.checkpointing.sharded_tensors import read_shards, write_shards


def test_shards_are_read_back_whole_and_without_the_memory_they_were_a_view_of(
    tmp_path, monkeypatch
):
    def gather(received: list[object], own: object, **_: object) -> None:
        received[0] = own

    monkeypatch.setattr(dist, "all_gather_object", gather)
    large = torch.arange(400_000.0).reshape(100_000, 4)
    tensors = {"a.weight": large[:3], "b": torch.ones(2, dtype=torch.bfloat16)}
    held = write_shards(tmp_path / "x", {k: (v, tuple(v.shape)) for k, v in tensors.items()}, None)
    found = read_shards(tmp_path / "x", held["tensors"], None)
    assert found.keys() == tensors.keys()
    assert all(found[key].equal(value) for key, value in tensors.items())
    ((name, (size, _)),) = held["files"].items()
    assert size == (tmp_path / "x" / name).stat().st_size < 10_000


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_that_torch_wrote_for_an_earlier_version_are_read(tmp_path):
    tensors = {"model.weight": torch.randn(5, 3), "average": torch.arange(7)}
    writer = torch_checkpoint.FileSystemWriter(tmp_path)
    torch_checkpoint.save(tensors, storage_writer=writer, no_dist=True)
    metadata = torch_checkpoint.FileSystemReader(tmp_path).read_metadata()
    index = {
        place.fqn: {
            "shape": list(tensors[place.fqn].shape),
            "dtype": tensors[place.fqn].dtype,
            "chunks": [
                [
                    [0] * tensors[place.fqn].ndim,
                    list(tensors[place.fqn].shape),
                    span.relative_path,
                    span.offset,
                    span.length,
                ]
            ],
        }
        for place, span in metadata.storage_data.items()
    }
    found = read_shards(tmp_path, index, None)
    assert found.keys() == tensors.keys()
    assert all(found[key].equal(value) for key, value in tensors.items())
