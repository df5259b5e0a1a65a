"""The script for own images: it trains, searches, and says what cannot be read."""

from __future__ import annotations

import pytest

from examples.own_data import main, read_pairs
from tests.recipes.emoji_files import LAYOUTS, captions, write_images


def test_the_script_trains_and_searches(tmp_path, capsys):
    write_images(tmp_path / "images")
    LAYOUTS["COCO captions"][1](tmp_path / "captions.json", captions())
    flags = ["--images", str(tmp_path / "images"), "--captions", str(tmp_path / "captions.json")]
    flags += ["--image-size", "32", "--epochs", "1", "--batch-size", "8", "--dim", "8"]

    trainer = main([*flags, "--run-dir", str(tmp_path / "run")])

    assert trainer.state.epoch == 1
    assert len(capsys.readouterr().out.splitlines()[-1].split("  ")) == 2
    table, summary = read_pairs(tmp_path / "images", tmp_path / "captions.json")
    assert (len(table.rows), "COCO captions" in summary) == (16, True)
    with pytest.raises(SystemExit, match="--captions must be a file"):
        read_pairs(tmp_path / "images", tmp_path / "gone.json")
