"""JSON files with a digest: any damage shows, and files without a digest are read as before."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from diptych.handlers.output.sealed_json import read_sealed, sealed

CONTENT = {"a": 1.5, "nested": {"b": ["x", None]}, "text": 'with "quotes", \n and more'}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "settings.json"
    file.write_text(sealed(json.dumps(CONTENT, indent=2) + "\n", file.name))
    return file


def test_what_was_written_is_read_and_is_json_to_others(path):
    assert read_sealed(path, "x") == CONTENT
    others = json.loads(path.read_text())
    assert others.pop("sealed") is True
    assert len(others.pop("digest")) == 64
    assert others == CONTENT


def test_a_file_without_a_digest_is_read(path):
    path.write_text(json.dumps(CONTENT))
    assert read_sealed(path, "x") == CONTENT


def test_every_flipped_bit_is_reported_with_file_and_way_out(path):
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3, 6):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(
                ValueError, match=r"settings.json must be .* or remove it: all ends"
            ):
                read_sealed(path, "all ends")


@pytest.mark.parametrize("seed", range(5))
def test_blocks_that_are_missing_repeated_or_zero_are_reported(path, seed):
    whole, draw = path.read_bytes(), random.Random(seed)
    for _ in range(40):
        start, length = draw.randrange(len(whole)), draw.choice((1, 4, 30))
        end = min(len(whole), start + length)
        for damaged in (
            whole[:start] + whole[end:],
            whole[:end] + whole[start:],
            whole[:start] + bytes(end - start) + whole[end:],
            whole[:start],
        ):
            path.write_bytes(damaged)
            if damaged != whole:
                with pytest.raises(ValueError, match=r"settings.json must be"):
                    read_sealed(path, "x")


@pytest.mark.parametrize(
    "text", ["", "[1]", "7", "{", '{"a": 1} x', "[" * 100_000, '{"digest": 1}', r'{"a": "\ud800"}']
)
def test_other_texts_are_refused(path, text):
    path.write_text(text)
    with pytest.raises(ValueError, match=r"settings.json must be a JSON object"):
        read_sealed(path, "x")


def test_half_characters_are_written_as_others_and_whole_ones_and_backslashes_as_they_are(path):
    content = {"path": "caf\udce9", "face": "\U0001f600", "text": r"\ud800 is \\udce9"}
    path.write_text(sealed(json.dumps(content, indent=2) + "\n", path.name))
    assert read_sealed(path, "x") == {**content, "path": "caf?"}


def test_the_content_of_another_file_is_refused(path):
    path.write_text(sealed(json.dumps(CONTENT, indent=2) + "\n", "identity.json"))
    with pytest.raises(ValueError, match="its digest is that of another text"):
        read_sealed(path, "x")


def test_a_path_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "gone", "x")
    with pytest.raises(IsADirectoryError, match=r"cannot be read: Is a directory\. Check the path"):
        read_sealed(tmp_path, "x")
