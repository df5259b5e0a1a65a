"""The columns of the table of runs."""

from __future__ import annotations

from typing import Any

from diptych import handlers
from diptych.handlers import CheckpointManager, LearningRate, ProgressBar, TensorBoard
from diptych.handlers.sinks.hyperparameters import (
    ONLY_SHOW,
    hyperparameters,
    session_end,
    session_start,
)
from diptych.handlers.sinks.run_directory import run_settings
from tests.handlers.runs import loader, make_trainer


def content(summary: Any) -> Any:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (value,) = summary.value
    assert value.metadata.plugin_data.plugin_name == "hparams"
    return HParamsPluginData.FromString(value.metadata.plugin_data.content)


def test_a_run_is_told_by_loss_optimizer_trainer_and_handlers(tmp_path):
    shown = (TensorBoard(tmp_path), ProgressBar(), CheckpointManager(tmp_path / "c"))
    trainer = make_trainer().attach(LearningRate(warmup=2), *shown)
    trainer.run(loader(), max_epochs=1)

    found = hyperparameters(run_settings(trainer))

    assert found["loss"] == "CrossEntropyLoss()"
    assert found["optimizer"] == "SGD"
    assert found["parameters"] == 3 * 4 + 4 + 4 * 2 + 2
    assert found["trainer/seed"] == 5
    assert found["LearningRate/warmup"] == 2
    assert all(isinstance(value, (str, float, int)) for value in found.values())
    assert not any(name.startswith(tuple(ONLY_SHOW)) for name in found)


def test_what_only_shows_a_run_is_known_by_the_names_of_handlers():
    assert set(handlers.__all__) >= ONLY_SHOW


def test_the_rate_is_the_one_that_was_given_not_the_schedules_first(tmp_path):
    trainer = make_trainer().attach(LearningRate(warmup=4))
    trainer.run(loader(), max_epochs=1)

    assert trainer.optimizer.param_groups[0]["lr"] != 0.1
    assert hyperparameters(run_settings(trainer))["optimizer/lr"] == 0.1


def test_numbers_texts_and_truth_values_keep_their_kind():
    start = content(session_start({"lr": 0.5, "loss": "clip", "compile": False}))

    cells = start.session_start_info.hparams
    assert cells["lr"].number_value == 0.5
    assert cells["loss"].string_value == "clip"
    assert cells["compile"].WhichOneof("kind") == "bool_value"


def test_the_end_says_success():
    from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS

    assert content(session_end()).session_end_info.status == STATUS_SUCCESS
