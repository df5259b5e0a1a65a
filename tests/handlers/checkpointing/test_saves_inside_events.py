"""`save_checkpoint` inside an event: the file is written where nothing is pending."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from diptych.engine import (
    EvaluationEvents,
    MetricsEvents,
    RunEvents,
    StepEvents,
    Trainer,
    TrainStep,
)
from diptych.handlers import CheckpointManager, Evaluation
from tests.handlers.checkpointing.test_checkpoint_manager import (
    digest,
    make_loader,
    make_trainer,
    record_values,
)
from tests.handlers.runs import report_each_epoch

EPOCHS = 3


def whole() -> tuple[str, list[Any]]:
    trainer = make_trainer()
    trainer.attach(Evaluation(make_loader(), loss=True))
    records = record_values(trainer)
    trainer.run(make_loader(), max_epochs=EPOCHS)
    return digest(trainer), records


def saving(folder: Path, event: Any, iteration: int) -> tuple[Trainer, list[Path], list[bool]]:
    """Return a trainer that saves by hand at an event, the paths, and whether the files exist."""
    trainer = make_trainer()
    manager = CheckpointManager(folder, every=10**6, keep=1)
    paths: list[Path] = []
    there: list[bool] = []

    def save(engine: Trainer, *_: object) -> None:
        if engine.state.iteration == iteration and not paths:
            paths.append(manager.save_checkpoint(engine.state.epoch, {"note": 7.0}))
            there.append(paths[0].exists())

    trainer.attach(manager, Evaluation(make_loader(), loss=True))
    trainer.add_event_handler(event, save)
    return trainer, paths, there


EVENTS = [
    (Events.GET_BATCH_STARTED, 8, "checkpoint_epoch_2_iteration_9.pt"),
    (Events.GET_BATCH_COMPLETED, 8, "checkpoint_epoch_2_iteration_9.pt"),
    (Events.EPOCH_STARTED, 6, "checkpoint_epoch_2_iteration_7.pt"),
    (Events.ITERATION_STARTED, 8, "checkpoint_epoch_2_iteration_8.pt"),
    (StepEvents.GRADIENTS_READY, 8, "checkpoint_epoch_2_iteration_8.pt"),
    (StepEvents.OPTIMIZER_STEPPED, 8, "checkpoint_epoch_2_iteration_8.pt"),
    (Events.ITERATION_COMPLETED, 8, "checkpoint_epoch_2_iteration_8.pt"),
    (MetricsEvents.LOGGED, 8, "checkpoint_epoch_2_iteration_8.pt"),
    (Events.EPOCH_COMPLETED, 12, "checkpoint_epoch_2.pt"),
    (EvaluationEvents.EVALUATED, 12, "checkpoint_epoch_2.pt"),
    (EvaluationEvents.BATCH_EVALUATED, 12, "checkpoint_epoch_2.pt"),
    (MetricsEvents.EPOCH_PUBLISHED, 12, "checkpoint_epoch_2.pt"),
]


@pytest.mark.parametrize(("event", "iteration", "name"), EVENTS)
def test_a_run_that_resumes_from_a_save_inside_an_event_is_the_uninterrupted_one(
    tmp_path, event, iteration, name
):
    trainer, paths, there = saving(tmp_path / "a", event, iteration)
    trainer.run(make_loader(), max_epochs=EPOCHS)
    assert there == [False]
    assert paths == [tmp_path / "a" / name]
    assert paths[0].is_file()  # though keep=1, and the run went on

    resumed = make_trainer()
    records = record_values(resumed)
    manager = CheckpointManager(tmp_path / "b", resume=paths[0])
    resumed.attach(manager, Evaluation(make_loader(), loss=True))
    resumed.run(make_loader(), max_epochs=EPOCHS)
    expected, all_records = whole()
    assert digest(resumed) == expected
    assert records == all_records[len(all_records) - len(records) :]
    saved = torch.load(paths[0], weights_only=True)
    assert saved["saved"] == {"epoch": 2, "metrics": {"note": 7.0}}


@pytest.mark.parametrize(
    "event", [Events.STARTED, RunEvents.SAFE_POINT, Events.COMPLETED, RunEvents.ENDED]
)
def test_where_nothing_is_pending_the_file_is_written_at_once(tmp_path, event):
    iteration = {Events.STARTED: 0, RunEvents.SAFE_POINT: 8}.get(event, 18)
    trainer, paths, there = saving(tmp_path, event, iteration)
    trainer.run(make_loader(), max_epochs=EPOCHS)
    assert there == [True]
    assert torch.load(paths[0], weights_only=True)["trainer"]["iteration"] == iteration


def test_a_step_function_saves_after_its_update(tmp_path):
    manager, paths = CheckpointManager(tmp_path), []

    class Saving(TrainStep):
        def __call__(self, trainer: Trainer, batch: Any) -> Any:
            if trainer.state.iteration == 3:
                paths.append(manager.save_checkpoint(1, {}))
            return super().__call__(trainer, batch)

    trainer = make_trainer().replica(step=Saving)
    trainer.attach(manager)
    trainer.run(make_loader(), max_epochs=1)
    state = torch.load(paths[0], weights_only=True)
    assert state["trainer"]["iteration"] == state["trainer"]["epoch_iteration"] == 3


def test_one_file_holds_a_save_by_hand_and_the_managers_own_of_one_point(tmp_path):
    trainer = make_trainer()
    report_each_epoch(trainer, 0.5, 0.9, 0.1)
    manager = CheckpointManager(tmp_path, best="val/recall@1", keep=1)
    trainer.attach(manager)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda: manager.save_checkpoint(trainer.state.epoch, {"note": float(trainer.state.epoch)}),
    )
    trainer.run(make_loader(), max_epochs=EPOCHS)
    names = [f"checkpoint_epoch_{epoch}.pt" for epoch in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == names  # none is removed
    assert manager.get_best_checkpoint() == tmp_path / names[1]
    for epoch, score in zip((1, 2, 3), (0.5, 0.9, 0.1), strict=True):
        metrics = manager.load_checkpoint(names[epoch - 1])[1]
        assert metrics["note"] == epoch
        assert metrics["val/recall@1"] == score


def test_the_path_of_a_save_that_replaces_a_file_is_the_new_files(tmp_path):
    trainer, manager = make_trainer(), CheckpointManager(tmp_path, every=3, keep=9)
    trainer.attach(manager)
    trainer.run(make_loader(), max_iters=3)
    paths = []
    again, manager = make_trainer(), CheckpointManager(tmp_path, every=3, keep=9)
    again.attach(manager)

    @again.on(Events.ITERATION_COMPLETED(once=6))
    def save() -> None:
        paths.append(manager.save_checkpoint(1, {}))

    again.run(make_loader(), max_iters=6)
    names = ["checkpoint_epoch_1_iteration_6.pt"]
    assert [path.name for path in paths] == names
    assert paths[0].is_file()
    third, manager = (
        make_trainer(),
        CheckpointManager(tmp_path, every=99, keep=9, resume="checkpoint_epoch_1_iteration_3.pt"),
    )
    third.attach(manager)
    third.add_event_handler(
        Events.ITERATION_COMPLETED(once=6), lambda: paths.append(manager.save_checkpoint(1, {}))
    )
    third.run(make_loader(), max_iters=6)
    assert paths[1].name == "checkpoint_epoch_1_iteration_6_again.pt"
    assert paths[1].is_file()
    assert manager.load_checkpoint(paths[0].name)[0] == 1


def test_a_run_that_fails_before_the_next_safe_point_saves_at_its_end(tmp_path):
    trainer, manager, paths = make_trainer(), CheckpointManager(tmp_path, every=4), []
    trainer.attach(manager)
    trainer.add_event_handler(
        Events.EXCEPTION_RAISED, lambda *_: paths.append(manager.save_checkpoint(2, {}))
    )
    trainer.add_event_handler(StepEvents.FORWARD_COMPLETED(once=11), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run(make_loader(), max_epochs=EPOCHS)
    state = torch.load(paths[0], weights_only=True)
    assert state["trainer"]["iteration"] == 10
    assert all(torch.equal(trainer.model.state_dict()[k], v) for k, v in state["model"].items())
    # A batch was in hand, which the state of the loader does not hold: no run continues there.
    resumed, manager = make_trainer(), CheckpointManager(tmp_path, every=4)
    resumed.attach(manager)
    assert manager.get_latest_checkpoint().name == "checkpoint_epoch_2_iteration_8.pt"
    resumed.run(make_loader(), max_epochs=EPOCHS)
    without = make_trainer()
    without.run(make_loader(), max_epochs=EPOCHS)
    assert digest(resumed) == digest(without)
