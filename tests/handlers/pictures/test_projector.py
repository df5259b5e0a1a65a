"""The files of the projector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diptych.handlers import EmbeddingProjector, PairSamples, TensorBoard
from tests.handlers.runs import loader, make_trainer


def fixed(_: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def samples() -> PairSamples:
    batch = {"image_features": torch.eye(3), "groups": torch.tensor([4, 4, 9])}
    texts = {"text_features": 2 * torch.eye(3)[:2], "groups": torch.tensor([4, 9])}
    return PairSamples(
        batches=[batch, texts],
        images=torch.zeros(3, 3, 8, 8),
        captions=["a\tdog", "the sun"],
        task=fixed,
    )


def run(folder: Path) -> None:
    trainer = make_trainer().attach(TensorBoard(folder), EmbeddingProjector(samples()))
    trainer.run(loader(), max_epochs=1)


def test_both_sides_are_points_of_unit_length_with_their_labels(tmp_path):
    run(tmp_path)

    points = (tmp_path / "projector" / "features.tsv").read_text().splitlines()
    assert points == ["1\t0\t0", "0\t1\t0", "0\t0\t1", "1\t0\t0", "0\t1\t0"]
    assert (tmp_path / "projector" / "labels.tsv").read_text().splitlines() == [
        "label\tside\tgroup",
        "a dog\timage\t4",
        "a dog\timage\t4",
        "the sun\timage\t9",
        "a dog\ttext\t4",
        "the sun\ttext\t9",
    ]


def test_the_thumbnails_are_a_square_in_the_order_of_the_points(tmp_path):
    from PIL import Image

    run(tmp_path)

    with Image.open(tmp_path / "projector" / "thumbnails.png") as picture:
        assert picture.size == (96, 96)  # three columns of 32 hold five
        centres = [picture.getpixel((x, y)) for y in (16, 48) for x in (16, 48, 80)]
    black, blue, white = (0, 0, 0), (44, 123, 182), (255, 255, 255)
    assert centres == [black, black, black, blue, blue, white]


def test_tensorboard_finds_the_files_that_the_configuration_names(tmp_path):
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    run(tmp_path)

    text = (tmp_path / "projector_config.pbtxt").read_text()
    (embedding,) = text_format.Parse(text, ProjectorConfig()).embeddings
    named = (embedding.tensor_path, embedding.metadata_path, embedding.sprite.image_path)
    assert all((tmp_path / path).is_file() for path in named)


def test_a_projector_without_a_board_is_an_error_when_the_run_starts():
    trainer = make_trainer().attach(EmbeddingProjector(samples()))

    with pytest.raises(ValueError, match="EmbeddingProjector needs a TensorBoard"):
        trainer.run(loader(), max_epochs=1)
