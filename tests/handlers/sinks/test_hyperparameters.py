"""The columns of the table of runs."""

from __future__ import annotations

from typing import Any

import attrs

from diptych.engine import Trainer
from diptych.handlers import CheckpointManager, LearningRate, ProgressBar, TensorBoard
from diptych.handlers.sinks.hyperparameters import (
    HyperparameterValue,
    hyperparameters,
    session_end,
    session_start,
)
from diptych.handlers.sinks.run_record import run_settings
from tests.handlers.runs import loader, make_trainer


def content(summary: Any) -> Any:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (value,) = summary.value
    assert value.metadata.plugin_data.plugin_name == "hparams"
    return HParamsPluginData.FromString(value.metadata.plugin_data.content)


@attrs.define(eq=False)
class Noise:
    """A handler that does not derive from `Handler`, so that what it changes is unknown."""

    scale: float = 0.5

    def attach(self, trainer: Trainer) -> None:
        trainer.state.noise = self.scale


def found_in(trainer: Trainer) -> dict[str, HyperparameterValue]:
    return hyperparameters(run_settings(trainer), trainer.handlers)


def test_runs_are_compared_by_loss_optimizer_trainer_and_the_handlers_that_change_them(tmp_path):
    shown = (TensorBoard(tmp_path), ProgressBar(), CheckpointManager(tmp_path / "c", keep=2))
    trainer = make_trainer().attach(LearningRate(warmup=2), Noise(), *shown)
    trainer.run(loader(), max_epochs=1)

    found = found_in(trainer)

    assert found["loss"] == "CrossEntropyLoss()"
    assert found["optimizer"] == "SGD"
    assert found["parameters"] == 3 * 4 + 4 + 4 * 2 + 2
    assert found["trainer/seed"] == 5
    assert found["LearningRate/warmup"] == 2
    assert found["Noise/scale"] == 0.5
    assert all(isinstance(value, (str, float, int)) for value in found.values())
    reporting = ("TensorBoard", "ProgressBar", "CheckpointManager")
    assert not any(name.startswith(reporting) for name in found)


def test_the_rate_is_the_given_one_and_not_the_first_of_the_schedule(tmp_path):
    trainer = make_trainer().attach(LearningRate(warmup=4))
    trainer.run(loader(), max_epochs=1)

    assert trainer.optimizer.param_groups[0]["lr"] != 0.1
    assert found_in(trainer)["optimizer/lr"] == 0.1


def test_numbers_texts_and_truth_values_keep_their_kind():
    start = content(session_start({"lr": 0.5, "loss": "clip", "compile": False}))

    cells = start.session_start_info.hparams
    assert cells["lr"].number_value == 0.5
    assert cells["loss"].string_value == "clip"
    assert cells["compile"].WhichOneof("kind") == "bool_value"


def test_the_end_says_success():
    from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS

    assert content(session_end()).session_end_info.status == STATUS_SUCCESS
