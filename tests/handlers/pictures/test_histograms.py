"""Distributions of weights and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diptych.handlers import Histograms, TensorBoard
from tests.handlers.runs import loader, make_trainer

PARAMETERS = ("0.weight", "0.bias", "2.weight", "2.bias")


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()


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
