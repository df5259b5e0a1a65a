"""The end of a run is saved whatever the cadence; a missing best metric is an error."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping as IgnitesEarlyStopping
from torch.utils.data import DataLoader

from diptych.engine import CheckpointError, MetricsEvents
from diptych.handlers import EarlyStopping, Evaluation, JsonLines
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from diptych.handlers.checkpointing.run_lock import RunLock
from tests.handlers.checkpointing.test_checkpoint_manager import digest, make_loader, make_trainer
from tests.handlers.runs import report_each_epoch


def saved_iterations(folder) -> list[int]:
    states = [torch.load(path, weights_only=True) for path in folder.glob("*.pt")]
    return sorted(state["trainer"]["iteration"] for state in states)


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_iters": 9}, {"max_iters": 12}])
@pytest.mark.parametrize("every", [100, 5])
def test_the_end_is_saved_and_a_larger_limit_continues_from_it(tmp_path, limit, every):
    first = make_trainer()
    first.attach(CheckpointManager(tmp_path, every=every))
    first.run(make_loader(), **limit)
    assert saved_iterations(tmp_path)[-1] == first.state.iteration

    resumed, whole = make_trainer(), make_trainer()
    resumed.attach(CheckpointManager(tmp_path, every=every))
    resumed.run(make_loader(), max_epochs=3)
    whole.run(make_loader(), max_epochs=3)
    assert resumed.state.iteration == 18
    assert digest(resumed) == digest(whole)


def test_the_end_is_saved_once(tmp_path, monkeypatch):
    trainer = make_trainer()
    manager = CheckpointManager(tmp_path, every=3)
    trainer.attach(manager)
    write, written = manager._store.write, []

    def noted(entry, state):
        written.append(entry.iteration)
        return write(entry, state)

    monkeypatch.setattr(manager._store, "write", noted)
    trainer.run(make_loader(), max_epochs=1)
    assert written == [3, 6]


@pytest.mark.parametrize("end", ["terminate", "interrupt"])
def test_a_run_that_ends_itself_early_is_saved_where_it_ends(tmp_path, end):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path, every=100))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=8), getattr(trainer, end))
    trainer.run(make_loader(), max_epochs=3)
    assert saved_iterations(tmp_path) == [8]
    resumed, whole = make_trainer(), make_trainer()
    resumed.attach(CheckpointManager(tmp_path, every=100))
    resumed.run(make_loader(), max_epochs=3)
    whole.run(make_loader(), max_epochs=3)
    assert digest(resumed) == digest(whole)


def test_a_run_that_early_stopping_ends_is_saved_and_stays_stopped(tmp_path, caplog):
    iterations = []
    for _ in range(2):
        trainer = make_trainer()
        report_each_epoch(trainer, 0.5, 0.4, 0.3, 0.2)
        trainer.attach(
            EarlyStopping(metric="val/recall@1", patience=2),
            CheckpointManager(tmp_path, every=100),
        )
        trainer.run(make_loader(), max_epochs=4)
        iterations.append(trainer.state.iteration)
    assert iterations == [18, 18]
    assert saved_iterations(tmp_path) == [18]
    assert "ends the run again" in caplog.text


@pytest.mark.parametrize("where", ["trainer", "evaluator", "attached"])
@pytest.mark.parametrize("manager_first", [True, False])
def test_a_run_that_ignites_early_stopping_ends_stays_stopped(
    tmp_path, caplog, where, manager_first
):
    epochs = []
    for patience in (2, 2, 3, 3):
        trainer, evaluator = make_trainer(), Engine(lambda *_: None)
        manager = CheckpointManager(tmp_path, every=100)
        if manager_first:
            trainer.attach(manager)
        stopping = IgnitesEarlyStopping(patience, lambda _, t=trainer: -t.state.epoch, trainer)
        if where == "trainer":
            trainer.add_event_handler(Events.EPOCH_COMPLETED, stopping)
        else:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _, e=evaluator: e.run([0]))
        if where == "evaluator":
            evaluator.add_event_handler(Events.COMPLETED, stopping)
        elif where == "attached":  # it forgets when a run starts
            stopping.attach(evaluator, reset_engine=trainer)
        if not manager_first:
            trainer.attach(manager)
        trainer.run(make_loader(), max_epochs=6)
        epochs.append(trainer.state.epoch)
    assert epochs == [3, 3, 4, 4]
    assert caplog.text.count("Ignite's EarlyStopping ends the run again") == 2


def test_the_last_weights_are_kept_if_the_loader_has_no_positions(tmp_path):
    trainer = make_trainer()
    manager = CheckpointManager(tmp_path, keep=1)
    trainer.attach(manager)
    trainer.run(DataLoader(make_loader().dataset, batch_size=4), max_iters=8)
    assert saved_iterations(tmp_path) == [6, 8]
    assert manager.get_latest_checkpoint() == tmp_path / "checkpoint_epoch_1.pt"


def test_the_last_record_of_a_run_is_never_lost_to_a_kill_after_its_last_iteration(tmp_path):
    class Killed(BaseException):
        pass

    def run(folder, *, kill: bool) -> bytes:
        trainer = make_trainer()  # logs every fourth iteration; the seventh at the end
        if kill:

            def end() -> None:
                if trainer.metrics.record.step == 7:
                    raise Killed

            trainer.add_event_handler(MetricsEvents.LOGGED, end)
        trainer.attach(JsonLines(folder), CheckpointManager(folder / "checkpoints", every=1))
        trainer.run(make_loader(), max_iters=7)
        return (folder / "metrics.jsonl").read_bytes()

    with pytest.raises(Killed):
        run(tmp_path / "killed", kill=True)
    expected = run(tmp_path / "whole", kill=False)
    assert run(tmp_path / "killed", kill=False) == expected
    assert b'"step": 7' in expected


@pytest.mark.parametrize("background", [False, True])
def test_the_end_is_saved_again_if_its_save_failed(tmp_path, monkeypatch, caplog, background):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path, every=4, background=background))
    failures = iter([True])

    def full(_: int) -> None:
        if (tmp_path / "checkpoint_epoch_2_iteration_8.pt.unfinished").exists():
            for _ in failures:
                raise OSError(28, "No space left on device")

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=8), trainer.terminate)
    monkeypatch.setattr(os, "fsync", full)
    trainer.run(make_loader(), max_epochs=3)
    assert "No space left" in caplog.text
    assert saved_iterations(tmp_path)[-1] == 8


def test_a_best_metric_may_come_with_a_later_evaluation(tmp_path):
    trainer = make_trainer()
    manager = CheckpointManager(tmp_path, best="val/loss", mode="min")
    trainer.attach(Evaluation(make_loader(), every=10), manager)
    trainer.run(make_loader(), max_epochs=3)
    best = torch.load(manager.get_best_checkpoint(), weights_only=True)
    assert best["trainer"]["iteration"] == 10


@pytest.mark.parametrize(
    ("every", "best", "iteration"), [(2, "val/los", 2), ("epoch", "val/los", 6), (99, "val/a", 18)]
)
def test_a_best_metric_that_no_evaluation_publishes_ends_the_run_with_a_checkpoint(
    tmp_path, every, best, iteration
):
    trainer = make_trainer()
    trainer.attach(
        Evaluation(make_loader(), every=every, check_first_batch=False),
        CheckpointManager(tmp_path, every=50, best=best),
    )
    with pytest.raises(CheckpointError, match=f"best must be .* got '{best}'; there are"):
        trainer.run(make_loader(), max_epochs=3)
    assert saved_iterations(tmp_path) == [iteration]


def test_a_metric_that_is_not_a_number_is_never_the_best_one(tmp_path):
    trainer = make_trainer()
    report_each_epoch(trainer, float("nan"), 0.1, float("nan"))
    manager = CheckpointManager(tmp_path, best="val/recall@1", keep=1)
    trainer.attach(manager)
    trainer.run(make_loader(), max_epochs=3)
    assert manager.get_best_checkpoint() == tmp_path / "checkpoint_epoch_2.pt"
    assert saved_iterations(tmp_path) == [12, 18]


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_iters": 6}])
def test_a_score_that_comes_after_a_stop_in_the_last_iteration_is_saved(tmp_path, limit):
    def run(*, stopped: bool) -> CheckpointManager:
        trainer, manager = make_trainer(), CheckpointManager(tmp_path, best="val/recall@1")
        report_each_epoch(trainer, 0.5)
        trainer.attach(manager)
        if stopped:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), trainer.terminate)
        trainer.run(make_loader(), **limit)
        return manager

    assert run(stopped=True).get_best_checkpoint() is None
    assert run(stopped=False).get_best_checkpoint() == tmp_path / "checkpoint_epoch_1.pt"


@pytest.mark.parametrize("length", [None, 6])
def test_a_metric_that_a_later_handler_publishes_at_the_end_of_an_epoch_ranks_it(tmp_path, length):
    trainer, manager = make_trainer(), CheckpointManager(tmp_path, best="val/recall@1", keep=9)
    trainer.attach(manager)
    report_each_epoch(trainer, 0.5, 0.9, 0.1)  # attached after the manager
    loader = make_loader()
    trainer.run(Unsized(loader) if length is None else loader, max_epochs=3)
    assert [entry.score for entry in manager._store.entries() if entry.score] == [0.5, 0.9, 0.1]
    assert manager.get_best_checkpoint() == tmp_path / "checkpoint_epoch_2.pt"


class Unsized:
    """A loader whose length the run learns in its first epoch."""

    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_the_directory_is_free_again_however_a_run_ends(tmp_path):
    for end in ("complete", "terminate", "interrupt", "fail"):
        trainer = make_trainer()
        manager = CheckpointManager(tmp_path / end)
        trainer.attach(manager)
        if end == "fail":
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: 1 / 0)
        elif end != "complete":
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), getattr(trainer, end))
        with contextlib.suppress(ZeroDivisionError):
            trainer.run(make_loader(), max_epochs=1)
        lock = RunLock(manager.directory)
        lock.acquire()  # which is an error while the run holds it
        lock.release()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_manager_only_reports_and_its_key_is_the_same_in_every_folder(tmp_path):
    managers = [CheckpointManager(tmp_path / name) for name in "ab"]
    assert [manager.key for manager in managers] == ["CheckpointManager"] * 2
    ranked = CheckpointManager(tmp_path / "c", best="val/loss")
    assert ranked.key == "CheckpointManager[val/loss]"
    assert not CheckpointManager.changes
