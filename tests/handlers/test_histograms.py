"""Distributions of weights and gradients, and the filters of the first layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diptych.handlers import Histograms, TensorBoard
from diptych.handlers.histograms import first_filters
from tests.handlers.runs import loader, make_trainer

PARAMETERS = ("0.weight", "0.bias", "2.weight", "2.bias")


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"histograms": 0, "images": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def run(folder: Path, **settings: Any) -> Any:
    trainer = make_trainer().attach(TensorBoard(folder), Histograms(**settings))
    trainer.run(loader(), max_epochs=1)
    return read(folder)


def test_each_parameter_has_its_weights_and_gradients_at_each_look(tmp_path):
    events = run(tmp_path, every=3)

    kinds = ("weights", "weight_gradients")
    expected = {f"{kind}/{name}" for kind in kinds for name in PARAMETERS}
    assert set(events.Tags()["histograms"]) == expected
    shown = events.Histograms("weights/0.weight")
    assert [event.step for event in shown] == [3, 6]
    assert shown[0].histogram_value.num == 12


def test_gradients_are_left_out_on_request(tmp_path):
    events = run(tmp_path, every=3, gradients=False)

    assert set(events.Tags()["histograms"]) == {f"weights/{name}" for name in PARAMETERS}


def test_values_that_are_not_finite_are_left_out(tmp_path):
    trainer = make_trainer().attach(TensorBoard(tmp_path), Histograms(every=1))
    board, histograms = trainer.handlers
    trainer.model[0].weight.data[0, 0] = torch.nan
    trainer.model[2].bias.data.fill_(torch.inf)

    histograms.draw(trainer)
    board.close()

    events = read(tmp_path)
    assert events.Histograms("weights/0.weight")[0].histogram_value.num == 11
    assert "weights/2.bias" not in events.Tags()["histograms"]


@pytest.mark.parametrize("channels", [1, 3])
def test_filters_that_look_at_colours_are_shown(channels):
    model = nn.Sequential(nn.Conv2d(channels, 10, 3), nn.Conv2d(10, 4, 3))

    picture = first_filters(model)

    assert picture is not None
    assert picture.shape == (3, 2 * 34, 8 * 34)


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv2d(4, 8, 3), nn.Conv2d(3, 8, 1)])
def test_other_first_layers_have_no_filters_to_show(layer):
    assert first_filters(nn.Sequential(layer)) is None
