"""Which checkpoints are the best, which are kept, and where a run goes on."""

from __future__ import annotations

import math

import pytest

from diptych.handlers.checkpointing.entries import Entry, Ranking, added, entry_from, resumable


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
def test_the_best_comes_first_and_the_earlier_of_two_equal_ones(mode, order):
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


def test_what_was_saved_by_hand_or_ranked_by_another_metric_is_never_superfluous():
    entries = [entry(1, by_hand=True), entry(2, 0.9, scored_by="val/loss"), entry(3), entry(4, 0.1)]
    assert Ranking("val/accuracy", "max", 1).superfluous(entries) == {"3.pt"}
    assert iterations(Ranking("val/accuracy", "max", 1).ranked(entries)) == [4]


def test_the_end_of_a_run_that_cannot_be_continued_is_kept_beside_where_it_goes_on():
    entries = [entry(1), entry(2), entry(3, resumable=False)]
    assert Ranking(None, "max", 1).superfluous(entries) == {"1.pt"}
    assert iterations(resumable(entries)) == [2, 1]


def test_a_run_that_went_back_is_not_continued_from_the_future_it_has_left():
    entries = added([entry(5), entry(10), entry(15, by_hand=True)], entry(7))
    assert iterations(resumable(entries)) == [7, 5]
    assert [e.resumable for e in entries] == [True, False, False, True]
    by_hand = added([entry(5), entry(10)], entry(7, by_hand=True))
    assert iterations(resumable(by_hand)) == [10, 7, 5]


def test_the_last_one_written_wins_where_two_are_of_one_iteration():
    first = Entry(file="a.pt", epoch=1, iteration=5, metrics={})
    second = Entry(file="b.pt", epoch=1, iteration=5, metrics={})
    assert [e.file for e in resumable([first, second])] == ["b.pt", "a.pt"]


def test_a_file_that_is_written_again_keeps_its_place_and_is_still_by_hand():
    entries = added([entry(5, by_hand=True), entry(6)], entry(5))
    assert [(e.iteration, e.by_hand) for e in entries] == [(6, False), (5, True)]


def test_what_a_newer_version_says_besides_is_passed_over():
    listed = {"file": "a.pt", "epoch": 1, "iteration": 2, "metrics": {}, "colour": "blue"}
    assert entry_from(listed) == Entry(file="a.pt", epoch=1, iteration=2, metrics={})
