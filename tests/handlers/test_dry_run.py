"""A dry run with every exported handler: it goes through, and leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych import handlers
from diptych.engine import SeededLoader, Trainer, tasks
from diptych.engine.handler import Handler
from diptych.engine.random_state import random_state
from diptych.engine.state.run_state import run_state
from tests.handlers.test_contract import (
    EXAMPLES,
    Samples,
    assert_same_run,
    assert_same_state,
    make_trainer,
)

SERVICES = {"ClearML", "MLflow", "ToLogger", "WandB"}


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def attributes_of(handler: Any) -> dict[str, Any]:
    """Return the attributes of a handler; containers copied, others by identity."""
    names = [n for kind in type(handler).__mro__ for n in getattr(kind, "__slots__", ())]
    held = {n: getattr(handler, n) for n in names if hasattr(handler, n)}
    held.update(getattr(handler, "__dict__", {}))
    return {n: copy.copy(v) if isinstance(v, (list, dict, set)) else v for n, v in held.items()}


def same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, (list, dict, set, str, int, float)) and one == other)


def snapshot(trainer: Trainer) -> dict[str, Any]:
    return copy.deepcopy({**run_state(trainer), "generators": random_state()})


@pytest.mark.parametrize("begun", [False, True], ids=["new", "between two runs"])
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_dry_run_leaves_handler_trainer_and_directory_as_they_were(name, begun, tmp_path, capsys):
    handler = EXAMPLES[name].build(tmp_path)
    loader = SeededLoader(Samples(), 4)
    trainer = make_trainer().attach(handler)
    if begun:
        trainer.run(loader, max_epochs=1)
    before, files, place = snapshot(trainer), files_in(tmp_path), loader.state_dict()
    held, own = attributes_of(handler), dict(vars(trainer))
    modes = [part.training for part in trainer.model.modules()]
    report = trainer.dry_run(loader)
    assert dict(vars(trainer)) == own
    assert_same_state(snapshot(trainer), before)
    assert files_in(tmp_path) == files
    assert loader.state_dict() == place
    after = attributes_of(handler)
    assert [n for n in held if not same(after[n], held[n])] == []
    assert [part.training for part in trainer.model.modules()] == modes
    assert report.left_out == ((handler.key,) if name in SERVICES else ())
    assert str(report) in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_run_after_a_dry_run_is_the_run_without_one(name, tmp_path):
    def trained(*, dry: bool) -> Trainer:
        folder = tmp_path / str(dry)
        trainer, loader = (
            make_trainer().attach(EXAMPLES[name].build(folder)),
            SeededLoader(Samples(), 4),
        )
        if dry:
            trainer.dry_run(loader)
            trainer.overfit(loader, updates=3)
        limits = {} if name == "StagePlan" else {"max_epochs": 2}
        trainer.run(loader, **limits)
        return trainer

    bare, tried = trained(dry=False), trained(dry=True)
    assert_same_run(tried, bare)
    assert_same_state(tried.optimizer.state_dict(), bare.optimizer.state_dict())


def test_the_report_names_what_was_done_and_what_was_not(tmp_path, capsys):
    trainer = make_trainer()
    sent: list[Any] = []
    called: list[Any] = []
    trainer.attach(
        handlers.GradientClipping(max_norm=1.0),
        handlers.Evaluation(SeededLoader(Samples(), 4)),
        handlers.ToLogger(lambda values, _: sent.append(values)),
        *handlers.default_handlers(tmp_path / "run", best="val/own", mode="min"),
    )

    @trainer.on(Events.EPOCH_COMPLETED)
    def publish() -> None:
        called.append(1)
        trainer.metrics.update({"val/own": 1.0})

    report = trainer.dry_run(SeededLoader(Samples(), 4), updates=2)
    rows = {row.part: row.result for row in report.rows}
    assert rows["update"].startswith("2 updates: loss ")
    assert rows["Evaluation[val]"].startswith("2 batches: val/loss ")
    assert rows["checkpoints"] == "saved once"
    assert set(report.left_out) == {"ToLogger", "publish at EPOCH_COMPLETED"}
    assert {"train/loss", "val/loss"} <= set(report.values)
    names = {path.name for path in report.files}
    assert {"metrics.jsonl", "settings.json", "manifest.json"} <= names
    assert all(path.is_relative_to(tmp_path / "run") for path in report.files)
    assert not (tmp_path / "run").exists()
    assert not sent
    assert not called
    out = capsys.readouterr()
    assert "publish at EPOCH_COMPLETED" in out.out
    assert "Files that a run would write; here they went into a scratch directory" in out.out
    assert not out.err  # the progress of a dry run is not shown


class Broken(Handler):
    """A user's handler, no attrs class, which notes its calls and raises once asked to."""

    def __init__(self, path: Path, *, raises: bool = False) -> None:
        self.path, self.calls, self.raises = path, [], raises

    def attach(self, trainer: Trainer) -> None:
        trainer.every(1, self.act)

    def act(self, trainer: Trainer) -> None:
        self.calls.append(trainer.state.iteration)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("done")
        if self.raises:
            raise ZeroDivisionError


def test_one_batch_of_an_evaluation_is_one_batch():
    trainer = make_trainer().attach(handlers.Evaluation(SeededLoader(Samples(), 4)))
    report = trainer.dry_run(SeededLoader(Samples(), 4), batches=1)
    (result,) = (row.result for row in report.rows if row.part == "Evaluation[val]")
    assert result.startswith("1 batch: val/loss ")


def test_a_handler_of_the_user_runs_as_a_copy_whose_paths_lead_elsewhere(tmp_path):
    handler = Broken(tmp_path / "a" / "note.txt")
    report = make_trainer().attach(handler).dry_run(SeededLoader(Samples(), 4), updates=3)
    assert handler.calls == []
    assert report.files == {tmp_path / "a" / "note.txt": 4}
    assert not (tmp_path / "a").exists()


def test_an_error_of_the_dry_run_reaches_the_caller_and_everything_is_restored(tmp_path):
    trainer = make_trainer().attach(Broken(tmp_path / "note.txt", raises=True))
    before, own = snapshot(trainer), dict(vars(trainer))
    with pytest.raises(ZeroDivisionError):
        trainer.dry_run(SeededLoader(Samples(), 4))
    assert dict(vars(trainer)) == own
    assert_same_state(snapshot(trainer), before)
    assert not list(tmp_path.iterdir())


def test_every_stage_of_a_plan_is_tried_with_its_own_loader():
    seen: list[int] = []

    def task(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(len(batch["label"]))
        return {"logits": model(batch["image"]), "labels": batch["label"]}

    warm = handlers.LearningRate(warmup=100)
    own = SeededLoader(Samples(), 6)
    plan = handlers.StagePlan(
        [
            handlers.Stage("first", epochs=30, lr=0.1, task=task),
            handlers.Stage("second", steps=500, lr=0.1, loader=own, task=task, schedule=warm),
        ]
    )
    trainer = make_trainer().attach(plan)
    trainer.dry_run(SeededLoader(Samples(), 4))
    assert seen == [4, 6, 6]
    assert torch.is_grad_enabled()


class OwnTrainer(Trainer):
    """A trainer with an attribute of its own, and a step that returns nothing."""

    def __init__(self, name: str) -> None:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        super().__init__(
            model, nn.CrossEntropyLoss(), optimizer, task=tasks.classification, step=self.update
        )
        self.name, self.seen = name, []

    def update(self, trainer: Trainer, batch: dict[str, Tensor]) -> None:
        assert trainer is self
        self.seen.append((self.name, self.state.iteration))
        with torch.no_grad():
            self.model.weight.add_(1)


def test_a_subclass_is_itself_in_a_dry_run_and_after_it():
    trainer, loader = OwnTrainer("mine"), SeededLoader(Samples(), 4)
    trainer.run(loader, max_iters=3)
    weight = trainer.model.weight.detach().clone()
    report = trainer.dry_run(loader)
    assert trainer.seen[3:] == [("mine", 1)]
    assert report.rows[0].result == "1 update"
    assert torch.equal(trainer.model.weight, weight)
    trainer.run(loader, max_iters=4)
    assert trainer.seen[4:] == [("mine", 4)]


def test_a_module_among_the_arguments_of_a_handler_is_restored():
    @attrs.define(eq=False)
    class Teacher(Handler):
        module: nn.Module

        def attach(self, trainer: Trainer) -> None:
            trainer.every(1, self.follow)

        def follow(self, _: Trainer) -> None:
            with torch.no_grad():
                self.module.weight.mul_(2)

    teacher = nn.Linear(2, 2)
    weight = teacher.weight.detach().clone()
    make_trainer().attach(Teacher(teacher)).dry_run(SeededLoader(Samples(), 4))
    assert torch.equal(teacher.weight, weight)
