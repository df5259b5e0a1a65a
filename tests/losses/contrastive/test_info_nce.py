"""InfoNCE with given negatives against a plain loop."""

import math

import pytest
import torch

from diptych.losses import CLIPLoss, InfoNCELoss
from tests.losses.oracles import cosine, dot, draw, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

FIRST, SECOND, NEGATIVES = draw(6, 4), draw(6, 4, seed=1), draw(6, 3, 4, seed=2)
GROUPS = [0, 1, 0, 2, 1, 3]
IDS = [[0, 1, 9], [8, 8, 2], [7, 7, 7], [3, 2, 1], [9, 9, 9], [6, 0, 4]]


def loop(scale: float, groups: list[int], ids: list[list[int]], similarity=cosine) -> list[float]:
    """Return the loss of direction first and of direction second."""
    queries, seconds = FIRST.tolist(), SECOND.tolist()
    given = [
        (row, i)
        for rows, own in zip(NEGATIVES.tolist(), ids, strict=True)
        for row, i in zip(rows, own, strict=True)
    ]
    losses: list[list[float]] = [[], []]
    for i in range(6):
        others = [j for j in range(6) if j == i or groups[j] != groups[i]]
        own = scale * similarity(queries[i], seconds[i])
        hard = [scale * similarity(queries[i], row) for row, n in given if n != groups[i]]
        rows = [scale * similarity(queries[i], seconds[j]) for j in others]
        columns = [scale * similarity(queries[j], seconds[i]) for j in others]
        losses[0].append(lse(rows + hard) - own)
        losses[1].append(lse(columns) - own)
    return [mean(losses[0]), mean(losses[1])]


@pytest.mark.parametrize("directions", ["both", "first", "second"])
def test_value_is_that_of_the_loop_for_negatives_of_every_query(directions: str) -> None:
    loss = InfoNCELoss(directions=directions, temperature=0.2)
    chosen = {"both": [0, 1], "first": [0], "second": [1]}[directions]
    alone, other = list(range(6)), [[-1] * 3] * 6
    for groups, ids in ((alone, other), (GROUPS, other), (GROUPS, IDS)):
        given = [] if groups is alone else [torch.tensor(groups)]
        given += [torch.tensor(ids)] if ids is IDS else []
        expected = mean(loop(5.0, groups, ids)[direction] for direction in chosen)
        assert math.isclose(float(loss(FIRST, SECOND, NEGATIVES, *given)), expected, rel_tol=1e-12)
        given[1:] = [i.flatten() for i in given[1:]]
        found = loss(FIRST, SECOND, NEGATIVES.flatten(0, 1), *given)
        assert math.isclose(float(found), expected, rel_tol=1e-12)


def test_a_query_or_negative_without_a_group_is_dropped_for_nothing() -> None:
    ungrouped = torch.tensor([-100, 1, -100, 2, 1, -1])
    loss = InfoNCELoss(directions="first", temperature=0.2)
    expected = loop(5.0, [10, 1, 11, 2, 1, 12], [[-7] * 3] * 6)[0]
    for ids in ([], [torch.full((6, 3), -100)]):
        found = loss(FIRST, SECOND, NEGATIVES, ungrouped, *ids)
        assert math.isclose(float(found), expected, rel_tol=1e-12)


def test_dot_products_at_temperature_1_are_those_of_dense_passage_retrieval() -> None:
    loss = InfoNCELoss(directions="first", temperature=1.0, normalize=False)
    expected = loop(1.0, list(range(6)), [[-1] * 3] * 6, dot)[0]
    assert math.isclose(float(loss(FIRST, SECOND, NEGATIVES)), expected, rel_tol=1e-12)


def test_without_negatives_it_is_clip() -> None:
    for groups in (None, torch.tensor(GROUPS)):
        found = InfoNCELoss(temperature=0.1)(FIRST, SECOND, None, groups)
        clip = CLIPLoss(temperature=0.1, learn_temperature=False, positives="mask")
        torch.testing.assert_close(found, clip(FIRST, SECOND, groups), rtol=1e-12, atol=0)


def test_ids_of_negatives_are_gathered_and_ranks_may_hold_different_numbers(ranks: Ranks) -> None:
    inputs = (FIRST, SECOND, NEGATIVES, torch.tensor(GROUPS), torch.tensor(IDS))
    assert_same_on_ranks(ranks, InfoNCELoss, inputs, splits=[(1, 3, 2), (6, 0)])


def _refused(rank: int) -> str:
    negatives = NEGATIVES if rank else None
    with pytest.raises(ValueError, match="negatives_given must be equal on all ranks") as raised:
        InfoNCELoss()(FIRST, SECOND, negatives)
    return str(raised.value)


def test_negatives_on_one_rank_alone_are_an_error_on_every_rank(ranks: Ranks) -> None:
    assert len(set(ranks.run(_refused, [(0,), (1,)]))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NEGATIVES[:5],), r"negatives must be \[6, k, 4\] or \[m, 4\]"),
        ((NEGATIVES[..., :3],), r"negatives must be \[6, k, 4\] or \[m, 4\]"),
        ((None, None, torch.tensor(IDS)), "negative_groups needs negatives"),
        ((NEGATIVES, None, torch.tensor(IDS)), "negative_groups needs groups"),
        ((NEGATIVES, torch.tensor(GROUPS), torch.tensor(GROUPS)), r"must be \[6, 3\]"),
    ],
)
def test_wrong_negatives_are_refused(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfoNCELoss()(FIRST, SECOND, *arguments)
    with pytest.raises(ValueError, match="directions must be one of 'both'"):
        InfoNCELoss(directions="query")
