"""Exported weights equal the trained ones when another program reads them."""

from __future__ import annotations

import sys

import pytest
import torch
from ignite.engine import Events
from safetensors.torch import load_file

from diptych.engine import CheckpointError
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from diptych.handlers.checkpointing.export import export_weights
from diptych.handlers.evaluation.evaluation import Evaluation
from diptych.handlers.optimization.weight_average import WeightAverage
from tests.handlers.checkpointing.test_checkpoint_manager import make_loader, make_trainer


def test_the_best_model_is_exported_with_bare_keys(tmp_path):
    trainer = make_trainer()
    scores, kept = iter([0.1, 0.9, 0.3]), {}

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate():
        value = {"val/accuracy": next(scores)}
        trainer.state.metrics.update(value)
        trainer.metrics.report(trainer.state.iteration, value)
        kept[trainer.state.epoch] = {k: v.clone() for k, v in trainer.model.state_dict().items()}

    trainer.attach(CheckpointManager(tmp_path, best="val/accuracy", export=True))
    trainer.run(make_loader(), max_epochs=3)
    exported = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == kept[2].keys()
    assert all(torch.equal(exported[key], kept[2][key]) for key in exported)


def test_without_a_metric_the_latest_model_is_exported(tmp_path):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path, export=True, background=True))
    trainer.run(make_loader(), max_epochs=2)
    exported = load_file(tmp_path / "model.safetensors")
    state = trainer.model.state_dict()
    assert all(torch.equal(exported[key], state[key]) for key in state)


def test_weights_that_were_not_scored_are_not_exported_as_the_best(tmp_path):
    trainer = make_trainer()
    manager = CheckpointManager(tmp_path, best="val/loss", mode="min", export=True)
    trainer.attach(WeightAverage(), Evaluation(list(make_loader())), manager)
    with pytest.raises(ValueError, match=r"averaged weights, as val/loss is, got export=True"):
        trainer.run(make_loader(), max_epochs=1)
    trained = make_trainer()
    trained.attach(
        WeightAverage(),
        Evaluation(list(make_loader()), weights="model"),
        CheckpointManager(tmp_path, best="val/loss", mode="min", export=True),
    )
    trained.run(make_loader(), max_epochs=1)
    assert (tmp_path / "model.safetensors").exists()


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"diptych\[safetensors\]"):
        CheckpointManager(tmp_path, export=True)


def test_tied_and_strided_weights_are_written_separately(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    export_weights({"a": weight, "b": weight.T}, tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors")
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["b"], weight.T)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing.*w.safetensors"):
        export_weights({"a": torch.ones(1)}, tmp_path / "missing" / "w.safetensors")


def test_extra_state_that_is_no_tensor_is_left_out_and_named(tmp_path):
    weights = {"weight": torch.ones(2), "part._extra_state": {"steps": 3}}
    with pytest.warns(UserWarning, match=r"m\.safetensors holds .*part\._extra_state of the model"):
        export_weights(weights, tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors").keys() == {"weight"}
