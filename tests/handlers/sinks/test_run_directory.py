"""Run folders, and the record of what a run was run with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from diptych.engine import Trainer, tasks
from diptych.handlers import CheckpointManager, JsonLines, RunRecord, latest_run, new_run
from tests.handlers.runs import loader, make_trainer


def test_every_run_has_a_new_folder_and_the_latest_is_the_last(tmp_path):
    runs = [new_run(tmp_path, "emoji") for _ in range(12)]

    assert len(set(runs)) == 12
    assert all(run.is_dir() and run.parent == tmp_path / "emoji" for run in runs)
    assert runs == sorted(runs)
    assert latest_run(tmp_path, "emoji") == runs[-1]


def test_a_name_without_runs_has_no_latest_one(tmp_path):
    (tmp_path / "emoji" / "notes").mkdir(parents=True)

    assert latest_run(tmp_path, "emoji") is None
    assert latest_run(tmp_path, "other") is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_a_name_that_is_no_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="the name of a run must be that of one folder"):
        new_run(tmp_path, name)


def make_run(root: Path) -> tuple[str, str]:
    return str(new_run(root, "emoji")), str(latest_run(root, "emoji"))


def latest_of(root: Path) -> Path | None:
    return latest_run(root, "none")


def test_all_ranks_get_the_folder_that_rank_zero_made(ranks, tmp_path):
    first, second = ranks.run(make_run, [(tmp_path,)] * 2)

    assert first == second
    assert first[0] == first[1]
    assert len(list((tmp_path / "emoji").iterdir())) == 1
    assert ranks.run(latest_of, [(tmp_path,)] * 2) == [None, None]


@attrs.define(eq=False)
class Custom:
    """A handler of somebody else's."""

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
        "components": {"0": 16, "1": 0, "2": 10},
    }


def test_the_record_holds_each_group_of_the_optimizer(tmp_path):
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": torch.tensor(0.5)}]
    optimizer = torch.optim.AdamW(groups, lr=0.25, betas=(0.5, 0.75))
    trainer = Trainer(
        model, nn.CrossEntropyLoss(), optimizer, task=tasks.classification, device="cpu"
    )

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
        },
        {
            "class": f"{here}.Custom",
            "limit": "Infinity",
            "model": "torch.nn.modules.activation.ReLU",
            "folders": ["a"],
        },
        {"class": f"{here}.Plain"},
        {"class": "diptych.handlers.sinks.run_directory.RunRecord", "directory": str(tmp_path)},
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
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["settings.json"]


def test_rank_zero_alone_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.handlers.sinks.run_directory.rank", lambda: 1)

    make_trainer().attach(RunRecord(tmp_path / "run")).run(loader(), max_epochs=1)

    assert not (tmp_path / "run").exists()
