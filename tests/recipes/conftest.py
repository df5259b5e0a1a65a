"""A small run of the command, which several tests read."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from diptych.__main__ import main
from tests.recipes.emoji_files import LAYOUTS, captions, write_images

SMALL = ["--image-size", "32", "--batch-size", "4", "--log-every", "2", "--dim", "16"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `images/` and `captions.txt`."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "images")
    LAYOUTS["comma-separated with a header"][1](folder / "captions.txt", captions())
    return folder


@pytest.fixture(scope="session")
def run(photos: Path) -> Path:
    """Return the directory of a run of two epochs; tests must not change it."""
    images, texts = str(photos / "images"), str(photos / "captions.txt")
    flags = ["--images", images, "--captions", texts, "--run-dir", str(photos / "run")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["train", *flags, *SMALL, "--epochs", "2", "--held-out", "0.3"]) == 0
    return photos / "run"
