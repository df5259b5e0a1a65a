"""Entries of a manifest: which are best, which are kept, and where a run continues."""

from __future__ import annotations

import math

import pytest

from diptych.handlers.checkpointing.entries import (
    Entry,
    Ranking,
    entry_from,
    resumable_entries,
    with_entry,
)


def entry(iteration: int, score: float | None = None, **settings) -> Entry:
    scored_by = None if score is None else "val/accuracy"
    return Entry(
        file=f"{iteration}.pt",
        epoch=1,
        iteration=iteration,
        metrics={},
        score=score,
        **{"scored_by": scored_by, **settings},
    )


def iterations(entries) -> list[int]:
    return [entry.iteration for entry in entries]


@pytest.mark.parametrize(("mode", "order"), [("max", [2, 3, 1]), ("min", [1, 2, 3])])
def test_the_best_comes_first_and_of_equal_ones_the_earlier(mode, order):
    entries = [entry(1, 0.1), entry(2, 0.5), entry(3, 0.5), entry(4)]
    assert iterations(Ranking("val/accuracy", mode, 3).ranked(entries)) == order


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_score_that_is_not_a_number_is_never_the_best(mode):
    entries = [entry(1, math.nan), entry(2, 0.2), entry(3, math.nan)]
    assert iterations(Ranking("val/accuracy", mode, 3).ranked(entries)) == [2]


def test_keep_one_leaves_the_best_and_the_latest():
    entries = [entry(1, 0.1), entry(2, 0.9), entry(3, 0.2), entry(4, 0.3)]
    assert Ranking("val/accuracy", "max", 1).superfluous(entries) == {"1.pt", "3.pt"}
    assert Ranking(None, "max", 1).superfluous([entry(1), entry(2), entry(3)]) == {"1.pt", "2.pt"}


def test_a_checkpoint_saved_by_hand_or_ranked_by_another_metric_is_never_superfluous():
    entries = [entry(1, by_hand=True), entry(2, 0.9, scored_by="val/loss"), entry(3), entry(4, 0.1)]
    assert Ranking("val/accuracy", "max", 1).superfluous(entries) == {"3.pt"}
    assert iterations(Ranking("val/accuracy", "max", 1).ranked(entries)) == [4]


def test_an_end_from_which_no_run_can_continue_is_kept_beside_the_latest_resumable_checkpoint():
    entries = [entry(1), entry(2), entry(3, resumable=False)]
    assert Ranking(None, "max", 1).superfluous(entries) == {"1.pt"}
    assert iterations(resumable_entries(entries)) == [2, 1]


def test_a_run_that_went_back_does_not_continue_from_later_checkpoints():
    entries = with_entry([entry(5), entry(10), entry(15, by_hand=True)], entry(7))
    assert iterations(resumable_entries(entries)) == [7, 5]
    assert [e.resumable for e in entries] == [True, False, False, True]
    by_hand = with_entry([entry(5), entry(10)], entry(7, by_hand=True))
    assert iterations(resumable_entries(by_hand)) == [10, 7, 5]


def test_of_two_checkpoints_of_one_iteration_the_last_written_one_counts():
    first = Entry(file="a.pt", epoch=1, iteration=5, metrics={})
    second = Entry(file="b.pt", epoch=1, iteration=5, metrics={})
    assert [e.file for e in resumable_entries([first, second])] == ["b.pt", "a.pt"]


def test_a_checkpoint_that_is_written_again_stays_saved_by_hand():
    entries = with_entry([entry(5, by_hand=True), entry(6)], entry(5))
    assert [(e.iteration, e.by_hand) for e in entries] == [(6, False), (5, True)]


def test_unknown_fields_of_a_newer_version_are_ignored():
    file = "checkpoint_epoch_1.pt"
    listed = {"file": file, "epoch": 1, "iteration": 2, "metrics": {}, "colour": "blue"}
    assert entry_from(listed) == Entry(file=file, epoch=1, iteration=2, metrics={})
