"""The record of a run's settings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from diptych.engine import RunIdentity, Trainer
from diptych.handlers import CheckpointManager, JsonLines, RunRecord
from tests.handlers.runs import classifier, loader, make_trainer


@attrs.define(eq=False)
class Custom:
    """A handler of another library."""

    limit: float = math.inf
    model: nn.Module = attrs.field(factory=nn.ReLU)
    folders: tuple[Path, ...] = (Path("a"),)
    _secret: int = 3
    count: int = attrs.field(default=0, init=False)

    def attach(self, trainer: Trainer) -> None:
        self.count += trainer.state.iteration


class Plain:
    """A handler without settings."""

    def attach(self, trainer: Trainer) -> None:
        trainer.state.plain = self


def recorded(folder: Path, trainer: Trainer) -> dict[str, object]:
    trainer.attach(RunRecord(folder)).run(loader(), max_epochs=2)
    return json.loads((folder / "settings.json").read_text(), parse_constant=pytest.fail)


def test_the_record_holds_the_resolved_settings(tmp_path):
    settings = recorded(tmp_path, make_trainer())

    assert settings["trainer"] == {
        "precision": "fp32",
        "microbatch_size": None,
        "device": "cpu",
        "prefetch": True,
        "compile": False,
        "seed": 5,
        "log_every": 4,
        "shard": False,
        "ranks": 1,
        "max_epochs": 2,
        "max_iters": None,
        "epoch_length": 6,
    }
    assert settings["iteration"] == 0


def test_the_record_counts_parameters_by_component(tmp_path):
    trainer = make_trainer()
    trainer.model[0].requires_grad_(False)

    assert recorded(tmp_path, trainer)["model"] == {
        "class": "torch.nn.modules.container.Sequential",
        "parameters": 26,
        "trainable": 10,
        "components": {"0": 16, "2": 10},
    }


def test_the_record_holds_each_group_of_the_optimizer(tmp_path):
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": torch.tensor(0.5)}]
    optimizer = torch.optim.AdamW(groups, lr=0.25, betas=(0.5, 0.75))
    trainer = classifier(model, optimizer)

    written = recorded(tmp_path, trainer)["optimizer"]

    assert written["class"] == "torch.optim.adamw.AdamW"
    first, second = written["groups"]
    assert (first["lr"], first["parameters"], first["betas"]) == (0.25, 6, [0.5, 0.75])
    assert (second["lr"], second["parameters"]) == (0.5, 2)


def test_the_record_holds_the_settings_of_handlers_as_far_as_json_can(tmp_path):
    trainer = make_trainer().attach(JsonLines(tmp_path), Custom(), Plain())

    handlers = recorded(tmp_path, trainer)["handlers"]

    here = __name__
    assert handlers == [
        {
            "class": "diptych.handlers.sinks.jsonl.JsonLines",
            "path": str(tmp_path / "metrics.jsonl"),
            "damaged": "refuse",
        },
        {
            "class": f"{here}.Custom",
            "limit": "Infinity",
            "model": "torch.nn.modules.activation.ReLU",
            "folders": ["a"],
        },
        {"class": f"{here}.Plain"},
        {"class": "diptych.handlers.sinks.run_record.RunRecord", "directory": str(tmp_path)},
    ]


def test_the_record_names_versions_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--epochs", "3"])

    settings = recorded(tmp_path, make_trainer())

    assert settings["command"] == ["train.py", "--epochs", "3"]
    assert settings["versions"]["torch"] == torch.__version__
    assert set(settings["versions"]) == {"python", "torch", "cuda", "ignite", "diptych", "platform"}


def test_a_resumed_run_says_from_where_and_leaves_no_unfinished_file(tmp_path):
    def run(epochs: int) -> None:
        manager = CheckpointManager(tmp_path / "checkpoints")
        trainer = make_trainer().attach(RunRecord(tmp_path), manager)
        trainer.run(loader(), max_epochs=epochs)

    run(1)
    run(2)

    assert json.loads((tmp_path / "settings.json").read_text())["iteration"] == 6
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["identity.json", "settings.json"]


def test_the_identity_of_the_run_is_a_file_of_its_own(tmp_path):
    trainer = make_trainer()
    recorded(tmp_path, trainer)

    read = RunIdentity.from_json((tmp_path / "identity.json").read_text())

    assert read.values == trainer.identity.values
    assert read.values["loader"]["length"] == 6


def test_rank_zero_alone_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.handlers.output.output_handler.rank", lambda: 1)

    make_trainer().attach(RunRecord(tmp_path / "run")).run(loader(), max_epochs=1)

    assert not (tmp_path / "run").exists()
