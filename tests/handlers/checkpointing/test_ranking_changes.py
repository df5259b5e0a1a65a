"""A run that changes its ranking, or starts another one elsewhere, says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ignite.engine import Events

from diptych.handlers import CheckpointManager
from tests.handlers.checkpointing.test_checkpoint_manager import make_loader, make_trainer
from tests.handlers.runs import report_each_epoch

SCORES = (0.2, 0.9, 0.5, 0.6)


def run(folder: Path, epochs: int, **settings: object) -> CheckpointManager:
    trainer = make_trainer()
    report_each_epoch(trainer, *SCORES)
    report_each_epoch(trainer, *SCORES[::-1], tag="val/other")
    manager = CheckpointManager(folder, keep=9, **settings)
    trainer.attach(manager)
    trainer.run(make_loader(), max_epochs=epochs)
    return manager


def test_a_run_from_another_directory_names_the_best_checkpoint_there_and_ranks_its_own(
    tmp_path, caplog
):
    first = run(tmp_path / "a", 2, best="val/recall@1")
    second = run(
        tmp_path / "b", 4, best="val/recall@1", resume=tmp_path / "a" / "checkpoint_epoch_2.pt"
    )
    assert caplog.text.count("A new ranking by val/recall@1 starts") == 1
    named = f"the best checkpoint so far, with 0.9, is {first.get_best_checkpoint()}"
    assert f"starts in {tmp_path / 'b'}: {named}" in caplog.text
    assert second.get_best_checkpoint() == tmp_path / "b" / "checkpoint_epoch_4.pt"
    caplog.clear()
    run(tmp_path / "b", 4, best="val/recall@1", resume=tmp_path / "a" / "checkpoint_epoch_2.pt")
    assert "ranking" not in caplog.text  # it continues its own


def test_a_copied_checkpoint_without_ranked_ones_beside_it_starts_a_new_ranking(tmp_path, caplog):
    run(tmp_path / "a", 2)
    run(tmp_path / "b", 3, best="val/recall@1", resume=tmp_path / "a" / "checkpoint_epoch_2.pt")
    assert "no checkpoint of the values so far is there" in caplog.text


def test_a_run_that_continues_where_it_was_says_nothing(tmp_path, caplog):
    run(tmp_path, 2, best="val/recall@1")
    run(tmp_path, 4, best="val/recall@1")
    assert not re.search(r"ranking|best is|mode is", caplog.text)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("val/recall@1", "val/other", "best is 'val/other' for {}, and was 'val/recall@1' when"),
        ("val/recall@1", None, "best is None for {}, and was 'val/recall@1' when"),
        (None, "val/other", "best is 'val/other' for {}, and was None when"),
    ],
)
def test_another_metric_is_logged(tmp_path, caplog, before, now, told):
    run(tmp_path, 2, best=before)
    run(tmp_path, 3, best=now)
    assert told.format(tmp_path) in caplog.text


def test_another_mode_is_logged_and_ranks_all_checkpoints(tmp_path, caplog):
    first = run(tmp_path, 2, best="val/recall@1")
    assert first.get_best_checkpoint() == tmp_path / "checkpoint_epoch_2.pt"
    second = run(tmp_path, 4, best="val/recall@1", mode="min")
    assert "mode is 'min' for best='val/recall@1', and was 'max' when the run was" in caplog.text
    assert second.get_best_checkpoint() == tmp_path / "checkpoint_epoch_1.pt"


def test_the_score_of_a_checkpoint_outlives_a_save_by_hand_of_the_same_weights(tmp_path):
    trainer = make_trainer()
    report_each_epoch(trainer, *SCORES)
    manager = CheckpointManager(tmp_path, best="val/recall@1")
    trainer.attach(manager)
    trainer.run(make_loader(), max_epochs=2)
    path = manager.save_checkpoint(2, {"note": 1.0})
    assert manager.get_best_checkpoint() == path
    assert manager.load_checkpoint(path) == (2, {"note": 1.0})


@pytest.mark.parametrize("every", [1, 4, "epoch"])
def test_a_value_that_belongs_to_the_cut_end_of_a_run_ranks_it_whatever_the_order(tmp_path, every):
    from diptych.handlers import Evaluation

    best = []
    for order in (1, -1):
        trainer = make_trainer()
        folder = tmp_path / str(order)
        manager = CheckpointManager(folder, every=every, best="val/loss", mode="min", keep=9)
        trainer.attach(*[manager, Evaluation(make_loader())][::order])
        trainer.run(make_loader(), max_iters=8)
        values = trainer.metrics.get_history("val/loss")
        assert len(values) == 2  # after the epoch of six, and at the end
        scored = {e.iteration: e.score for e in manager._store.entries() if e.score is not None}
        assert scored == dict(zip((6, 8), values, strict=True))
        best.append(manager.get_best_checkpoint().name)
    assert best[0] == best[1]


def test_a_handler_that_the_run_ends_in_does_not_change_which_values_were_judged(tmp_path):
    """A run is cut in epoch 3, continued from another directory's save, and ranks epoch 3."""
    trainer = make_trainer()
    report_each_epoch(trainer, *SCORES)
    trainer.attach(CheckpointManager(tmp_path / "a", every=4))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=16), trainer.terminate)
    trainer.run(make_loader(), max_epochs=4)
    path = tmp_path / "a" / "checkpoint_epoch_3_iteration_16.pt"
    second = run(tmp_path / "b", 3, best="val/recall@1", resume=path)
    assert second.get_best_checkpoint() == tmp_path / "b" / "checkpoint_epoch_3.pt"
