"""Shards: members of any key and suffix, damaged ones that are counted, and the order."""

from __future__ import annotations

import io
import logging
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from diptych.recipes.data import shards as shards_module
from diptych.recipes.data.image_batches import PairBatch
from diptych.recipes.data.rows import DataError
from diptych.recipes.data.shards import (
    DAMAGED,
    ShardLoader,
    ShardReader,
    caption_of,
    count_samples,
    samples_of,
    shard_paths,
)
from diptych.recipes.towers.resize import Resize
from diptych.recipes.towers.small_towers import tokenize_all


def jpeg(shade: int, size: tuple[int, int] = (20, 14)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, shade).save(file, "JPEG")
    return file.getvalue()


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Return three shards of four samples of different sizes, and one broken sample in each."""
    for shard in range(3):
        members: dict[str, bytes] = {}
        for number in range(4):
            key = f"part.{shard}/photo.v{number}"
            members[f"{key}.JPG"] = jpeg(60 * number, (20 + number, 14))
            members[f"{key}.txt"] = f"photo {shard} {number}".encode()
        members |= {"x.jpg": b"no image", "x.txt": b"x"}
        write_shard(tmp_path / f"{shard:05}.tar", members)
    return sorted(tmp_path.glob("*.tar"))


def loader(paths: list[Path], **options: int) -> ShardLoader:
    reader = ShardReader(
        resize=Resize(32), augment=("crop:0.5", "flip"), seed=options.pop("seed", 0)
    )
    given = {"batch_size": 4, "batches": 3, **options}
    return ShardLoader(paths, reader=reader, collate=PairBatch(tokenize_all), **given)


def test_ranges_and_stars_name_the_files(shards, monkeypatch):
    folder = shards[0].parent

    assert shard_paths(f"{folder}/{{00000..00002}}.tar") == shards
    assert shard_paths(f"{folder}/*.tar") == shards
    assert shard_paths(str(shards[1])) == [shards[1]]
    for wrong in (f"{folder}/{{00000..00003}}.tar", f"{folder}/*.zip", "pipe:echo x"):
        with pytest.raises(DataError, match="--shards must name tar files on this machine"):
            shard_paths(wrong)
    monkeypatch.setattr(shards_module, "MOST_SHARDS", 1000)
    with pytest.raises(DataError, match="at most 1,000 files"):
        shard_paths("{0..99999999999}.tar")


def test_a_sample_is_what_has_one_name_and_its_caption_is_in_text_or_json(tmp_path):
    members = {
        "._a.jpg": b"0",
        "a.jpg": b"1",
        "._a.json": b"0",
        "a.json": b'{"TEXT_1": "one"}',
        "b.v2.png": b"2",
        "b.v2.txt": b"two",
    }
    path = write_shard(tmp_path / "a.tar", members)

    found = list(samples_of(path, Counter()))

    assert [(key, sorted(parts)) for key, parts in found] == [
        ("a", [".jpg", ".json"]),
        ("b.v2", [".png", ".txt"]),
    ]
    assert [caption_of(parts) for _, parts in found] == ["one", "two"]
    odd = [rb'{"caption": ["\ud83d one", "two"]}', b'{"caption": "", "text": null, "title": "a"}']
    assert [caption_of({".json": one}) for one in odd] == ["? one", "a"]
    assert caption_of({".txt": "\ufeffone\n".encode()}) == "one"
    assert caption_of({".txt": "one".encode("utf-16")}) == "one"
    assert caption_of({".json": b"[" * 99_999}) == caption_of({".json": b'"x"'}) == ""


def test_a_shard_that_was_cut_off_gives_what_is_whole(shards):
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[: len(whole) // 3])
    skipped = Counter[str]()

    found = list(samples_of(shards[0], skipped))

    assert 0 < len(found) < 4
    assert skipped == {DAMAGED: 1}


def test_samples_are_counted_and_a_shard_without_any_is_an_error(shards, tmp_path):
    assert count_samples(shards[0]) == 5

    with pytest.raises(DataError, match=r"must have samples of an image .* none, but \.json\."):
        count_samples(write_shard(tmp_path / "empty.tar", {"a.json": b"{}"}))


def test_an_epoch_is_the_same_again_and_each_has_its_own_order(shards, caplog):
    given = loader(shards)
    with caplog.at_level(logging.WARNING):
        first = list(given)
    again = list(loader(shards))
    given.set_epoch(1)
    second = list(given)

    pairs = zip(first, again, strict=True)
    assert all(torch.equal(one[key], two[key]) for one, two in pairs for key in one)
    assert set(first[0]) == {"image", "text", "group", "image_id", "caption_id"}
    assert first[0]["image"].shape == (4, 3, 32, 32)
    groups = [torch.cat([batch["group"] for batch in epoch]) for epoch in (first, second)]
    assert len(groups[0].unique()) == 12  # each sample once, the broken ones not at all
    assert groups[0].tolist() != groups[1].tolist()
    assert "Skipped" in caplog.text
    assert "the file cannot be read as an image" in caplog.text


def test_the_calling_process_keeps_its_random_state(shards):
    torch.manual_seed(5)
    state = torch.get_rng_state()

    list(loader(shards))

    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_workers_share_the_shards(shards):
    epochs = [list(loader(shards, workers=2, batch_size=2, batches=6)) for _ in range(2)]

    first, again = (torch.cat([batch["group"] for batch in epoch]) for epoch in epochs)
    assert torch.equal(first, again)
    assert len(first.unique()) >= 8
