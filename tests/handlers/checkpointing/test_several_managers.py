"""Several managers of one trainer: one resume from the newest checkpoint, a ranking for each."""

from __future__ import annotations

import os
import re
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from diptych.engine import CheckpointError, RunEvents, Trainer
from diptych.handlers import CheckpointManager
from diptych.handlers.checkpointing.run_lock import RunLock
from tests.handlers.checkpointing.test_checkpoint_manager import digest, make_loader, make_trainer
from tests.handlers.runs import report_each_epoch

SCORES = (0.5, 0.9, 0.1, 0.7)
LENGTH = 6


class Killed(BaseException):
    """Imitates the end of the process."""


def build(folder: Path, *managers: dict[str, Any]) -> tuple[Trainer, list[CheckpointManager]]:
    """Return a trainer that reports a score each epoch, with a manager for each set of arguments.

    Without arguments: one manager for the best checkpoint, and one for the latest ones.
    """
    given = managers or (
        {"directory": "best", "best": "val/recall@1", "keep": 1},
        {"directory": "last", "every": 4, "keep": 1},
    )
    trainer = make_trainer()
    report_each_epoch(trainer, *SCORES)
    made = [CheckpointManager(folder / one.pop("directory"), **one) for one in map(dict, given)]
    trainer.attach(*made)
    return trainer, made


def kill_at(trainer: Trainer, iteration: int) -> None:
    def kill() -> None:
        raise Killed

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=iteration), kill)


def run_killed(folder: Path, iteration: int, *managers: dict[str, Any]) -> None:
    trainer, _ = build(folder, *managers)
    kill_at(trainer, iteration)
    with pytest.raises(Killed):
        trainer.run(make_loader(), max_epochs=4)


def starts(trainer: Trainer) -> list[int]:
    """Return a list that gets the iteration at which the trainer starts."""
    started: list[int] = []
    trainer.add_event_handler(Events.STARTED, lambda: started.append(trainer.state.iteration))
    return started


def whole() -> str:
    trainer, _ = make_trainer(), None
    report_each_epoch(trainer, *SCORES)
    trainer.run(make_loader(), max_epochs=4)
    return digest(trainer)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("killed", "start"), [(7, 6), (11, 8), (13, 12), (23, 20)])
def test_the_newest_checkpoint_of_all_directories_is_resumed(tmp_path, killed, start, swapped):
    run_killed(tmp_path, killed)
    best = {"directory": "best", "best": "val/recall@1", "keep": 1}
    last = {"directory": "last", "every": 4, "keep": 1}
    trainer, managers = build(tmp_path, *((last, best) if swapped else (best, last)))
    started = starts(trainer)
    trainer.run(make_loader(), max_epochs=4)
    assert started == [start]
    assert digest(trainer) == whole()
    ranked = managers[swapped]
    assert ranked.get_best_checkpoint() == tmp_path / "best" / "checkpoint_epoch_2.pt"


def test_a_checkpoint_is_loaded_once_and_named_at_the_default_level(tmp_path, caplog):
    run_killed(tmp_path, 11)
    caplog.set_level("WARNING")
    trainer, _ = build(tmp_path)
    trainer.run(make_loader(), max_epochs=4)
    assert caplog.text.count("Resumed from") == 1
    assert f"Resumed from {tmp_path / 'last' / 'checkpoint_epoch_2_iteration_8.pt'}" in caplog.text


def test_a_newer_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, caplog):
    run_killed(tmp_path, 11)
    (path,) = (tmp_path / "last").glob("*.pt")
    path.write_bytes(path.read_bytes()[:99])
    trainer, _ = build(tmp_path)
    started = starts(trainer)
    trainer.run(make_loader(), max_epochs=4)
    assert started == [6]
    assert path.name in caplog.text
    assert digest(trainer) == whole()


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("first", ["best", "last"])
def test_a_kill_between_the_saves_of_two_managers_loses_no_score(tmp_path, first, background):
    """Both save the end of epoch 2, the best one; the process ends when the first has saved."""
    best = {"directory": "best", "best": "val/recall@1", "keep": 1, "background": background}
    last = {"directory": "last", "keep": 1, "background": background}
    order = (best, last) if first == "best" else (last, best)
    trainer, _ = build(tmp_path, *order)

    def kill() -> None:  # the event follows the save of the first one
        if trainer.state.epoch == 2:
            raise Killed

    trainer.add_event_handler(RunEvents.SAVED, kill)
    with pytest.raises(Killed):
        trainer.run(make_loader(), max_epochs=4)

    resumed, managers = build(tmp_path, *order)
    started = starts(resumed)
    resumed.run(make_loader(), max_epochs=4)
    assert started == [12]
    ranked = managers[order.index(best)]
    path = ranked.get_best_checkpoint()
    assert path == tmp_path / "best" / "checkpoint_epoch_2.pt"
    assert torch.load(path, weights_only=True)["trainer"]["iteration"] == 2 * LENGTH
    assert digest(resumed) == whole()


def test_two_rankings_keep_apart_and_continue(tmp_path):
    managers = (
        {"directory": "high", "best": "val/recall@1", "keep": 1},
        {"directory": "low", "best": "val/recall@1", "mode": "min", "keep": 1},
        {"directory": "last", "every": timedelta(days=1)},
    )
    run_killed(tmp_path, 16, *managers)
    trainer, made = build(tmp_path, *managers)
    trainer.run(make_loader(), max_epochs=4)
    best = [manager.get_best_checkpoint() for manager in made]
    assert [path and path.name for path in best] == [
        "checkpoint_epoch_2.pt",
        "checkpoint_epoch_3.pt",
        None,
    ]
    assert made[2].get_latest_checkpoint() == tmp_path / "last" / "checkpoint_epoch_4.pt"


def test_a_manager_more_or_less_does_not_prevent_resuming(tmp_path):
    last = {"directory": "last", "every": 4}
    hourly = {"directory": "hourly", "every": timedelta(hours=1)}
    run_killed(tmp_path, 9, last)
    more, _ = build(tmp_path, hourly, last)
    kill_at(more, 15)
    with pytest.raises(Killed):
        more.run(make_loader(), max_epochs=4)
    fewer, _ = build(tmp_path, last)
    started = starts(fewer)
    fewer.run(make_loader(), max_epochs=4)
    assert started == [12]
    assert digest(fewer) == whole()


def test_a_new_run_for_one_manager_needs_only_its_directory_to_be_empty(tmp_path):
    last = {"directory": "last", "every": 4}
    run_killed(tmp_path, 9, last)
    best = {"directory": "best", "best": "val/recall@1", "resume": None}
    trainer, (manager, _) = build(tmp_path, best, last)
    started = starts(trainer)
    trainer.run(make_loader(), max_epochs=4)
    assert started == [8]
    assert manager.get_best_checkpoint() == tmp_path / "best" / "checkpoint_epoch_2.pt"
    again, _ = build(tmp_path, best, last)
    with pytest.raises(CheckpointError, match="must hold no checkpoint if resume is None"):
        again.run(make_loader(), max_epochs=4)


def test_going_back_in_one_directory_gives_up_the_later_checkpoints_of_all(tmp_path):
    kept = ({"directory": "a", "keep": 9}, {"directory": "b", "every": 4, "keep": 9})
    run_killed(tmp_path, 23, *kept)
    back = ({**kept[0], "resume": "checkpoint_epoch_1.pt"}, kept[1])
    trainer, _ = build(tmp_path, *back)
    started = starts(trainer)
    kill_at(trainer, 14)  # a/ has saved iteration 12, and b/ 8 and 12
    with pytest.raises(Killed):
        trainer.run(make_loader(), max_epochs=4)
    again, _ = build(tmp_path, *kept)
    started += starts(again)
    again.add_event_handler(Events.STARTED, lambda: started.append(again.state.iteration))
    again.run(make_loader(), max_epochs=4)
    assert started == [6, 12]
    assert digest(again) == whole()


def test_a_run_that_went_back_and_saved_once_continues_from_that_save(tmp_path):
    kept = ({"directory": "a", "keep": 9}, {"directory": "b", "every": 4, "keep": 9})
    run_killed(tmp_path, 23, *kept)
    trainer, _ = build(tmp_path, {**kept[0], "resume": "checkpoint_epoch_1.pt"}, kept[1])
    kill_at(trainer, 9)  # b/ alone has saved, iteration 8; a/ has 12 and 18 of the run before
    with pytest.raises(Killed):
        trainer.run(make_loader(), max_epochs=4)
    again, _ = build(tmp_path, *kept)
    started = starts(again)
    again.run(make_loader(), max_epochs=4)
    assert started == [8]


def test_managers_that_name_different_checkpoints_are_an_error(tmp_path):
    run_killed(tmp_path, 20, {"directory": "a", "keep": 9}, {"directory": "b", "keep": 9})
    trainer, _ = build(
        tmp_path,
        {"directory": "a", "resume": "checkpoint_epoch_1.pt"},
        {"directory": "b", "resume": "checkpoint_epoch_2.pt"},
    )
    before = digest(trainer)
    named = re.escape(str(tmp_path / "a" / "checkpoint_epoch_1.pt"))
    with pytest.raises(CheckpointError, match=f"resume must name one checkpoint.*{named}"):
        trainer.run(make_loader(), max_epochs=4)
    assert digest(trainer) == before


def test_another_runs_checkpoint_is_used_only_while_all_directories_are_empty(tmp_path):
    run_killed(tmp_path / "other", 9, {"directory": "last", "every": 4})
    path = tmp_path / "other" / "last" / "checkpoint_epoch_2_iteration_8.pt"
    managers = (
        {"directory": "best", "best": "val/recall@1", "resume": path},
        {"directory": "last", "every": 5, "resume": path},
    )
    started = []
    for killed in (11, 99):
        trainer, _ = build(tmp_path, *managers)
        started.append(starts(trainer))
        kill_at(trainer, killed)
        if killed < 24:
            with pytest.raises(Killed):
                trainer.run(make_loader(), max_epochs=4)
        else:
            trainer.run(make_loader(), max_epochs=4)
    assert started == [[8], [10]]
    assert digest(trainer) == whole()


def test_every_directory_is_locked_before_anything_is_loaded(tmp_path):
    run_killed(tmp_path, 11)
    lock = RunLock(tmp_path / "last")
    lock.acquire()
    trainer, _ = build(tmp_path)
    before = digest(trainer)
    with pytest.raises(CheckpointError, match="has it"):
        trainer.run(make_loader(), max_epochs=4)
    assert digest(trainer) == before
    assert trainer.state.iteration == 0
    lock.release()
    RunLock(tmp_path / "best").acquire()  # the run has let go of it


def test_a_signal_saves_in_all_directories(tmp_path):
    trainer, managers = build(tmp_path)
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=9), lambda: os.kill(os.getpid(), signal.SIGTERM)
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        trainer.run(make_loader(), max_epochs=4)
    assert signal.getsignal(signal.SIGTERM) == before
    for manager in managers:
        path = manager.get_latest_checkpoint()
        assert path == manager.directory / "checkpoint_epoch_2_iteration_9.pt"


def test_the_keys_of_managers_do_not_depend_on_the_order_of_attachment(tmp_path):
    def keys(*names: str) -> dict[str, str]:
        managers = [CheckpointManager(tmp_path / name) for name in names]
        make_trainer().attach(*managers)
        return {manager.directory.name: manager.key for manager in managers}

    expected = {"best": "CheckpointManager", "last": "CheckpointManager[last]"}
    assert keys("best", "last") == keys("last", "best") == expected
