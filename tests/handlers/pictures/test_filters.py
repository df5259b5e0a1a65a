"""The filters of the first layer as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import Trainer, tasks
from diptych.handlers import FirstLayerFilters, TensorBoard
from diptych.handlers.pictures.filters import COLUMNS, SIDE, filter_picture, first_layer

CELL = SIDE + 2


def make_trainer(first: nn.Module) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(first, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, task=tasks.classification, device="cpu")


def batches() -> list[dict[str, Tensor]]:
    images = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return [{"image": image, "label": torch.arange(4) % 2} for image in images]


def shown(folder: Path) -> list[Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return list(events.Images("visual/filters"))


def test_the_filters_are_drawn_before_training_and_after_each_epoch(tmp_path):
    from PIL import Image

    trainer = make_trainer(nn.Conv2d(3, 10, 3))
    trainer.attach(TensorBoard(tmp_path), FirstLayerFilters()).run(batches(), max_epochs=2)

    pictures = shown(tmp_path)
    assert [picture.step for picture in pictures] == [0, 3, 6]
    assert Image.open(io.BytesIO(pictures[0].encoded_image_string)).size == (8 * CELL, 2 * CELL)
    assert pictures[0].encoded_image_string != pictures[2].encoded_image_string


def test_each_filter_is_stretched_to_its_own_range():
    layer = nn.Conv2d(3, 2, 2)
    layer.weight.data = torch.arange(24.0).view(2, 3, 2, 2) * torch.tensor([1e-3, 50.0]).view(
        2, 1, 1, 1
    )

    picture = filter_picture(layer)

    # A filter runs from 0 (its first red) to 255 (its last blue), whatever its scale.
    for left in (0, CELL):
        corner, last = picture[:, 0, left], picture[:, SIDE - 1, left + SIDE - 1]
        assert corner.tolist() == [0, round(4 / 11 * 255), round(8 / 11 * 255)]
        assert last.tolist() == [round(3 / 11 * 255), round(7 / 11 * 255), 255]


def test_at_most_64_filters_are_shown_and_one_channel_is_grey():
    picture = filter_picture(nn.Conv2d(1, 100, 5))

    assert picture.shape == (3, 64 // COLUMNS * CELL, COLUMNS * CELL)
    assert torch.equal(picture[0], picture[2])


def test_the_first_layer_that_looks_at_pixels_is_found_behind_others():
    patches = nn.Conv2d(3, 8, 16, stride=16)

    found = first_layer(nn.Sequential(nn.Linear(3, 2), nn.Conv2d(4, 8, 3), patches))

    assert found is patches


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(4, 8, 3), nn.Conv2d(3, 8, 1)])
def test_a_model_without_such_a_layer_is_refused_when_the_run_starts(layer, tmp_path):
    trainer = make_trainer(nn.Identity()).attach(TensorBoard(tmp_path), FirstLayerFilters())
    trainer.model.append(layer)

    with pytest.raises(ValueError, match=r"Conv2d over 1 or 3 channels .*Remove the handler"):
        trainer.run(batches())
