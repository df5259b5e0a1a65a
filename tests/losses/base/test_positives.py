"""Matching pairs, against a loop over all pairs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.losses import Positives
from diptych.losses.base.gather import GlobalBatch
from diptych.losses.base.positives import same_group, with_own_groups, without_own_groups

IDS = st.lists(st.integers(-2, 3), min_size=1, max_size=8)


@given(ids=IDS)
def test_pairs_match_by_group_and_on_the_diagonal(ids: list[int]) -> None:
    groups = torch.tensor(ids)
    n = len(ids)
    positives = Positives(n, torch.arange(n), None, groups, groups)
    matches = positives.matches()
    assert matches.tolist() == [[a == b for b in ids] for a in ids]
    assert torch.equal(positives.negatives(), ~matches)
    assert torch.equal(positives.own(), torch.eye(n, dtype=torch.bool))
    assert torch.equal(positives.counts(), matches.sum(1))


@given(ids=IDS)
def test_an_anchor_among_the_candidates_is_neither_positive_nor_negative(ids: list[int]) -> None:
    groups = torch.tensor(ids)
    n = len(ids)
    positives = Positives(n, None, torch.arange(n), groups, groups)
    expected = [[a == b and i != j for j, b in enumerate(ids)] for i, a in enumerate(ids)]
    assert positives.matches().tolist() == expected
    assert torch.equal(positives.counts(), positives.matches().sum(1))
    neither = ~(positives.matches() | positives.negatives())
    assert torch.equal(neither, torch.eye(n, dtype=torch.bool))


@given(ids=IDS, start=st.integers(0, 7), stop=st.integers(0, 8))
def test_a_block_of_anchors_has_the_rows_of_the_whole(
    ids: list[int], start: int, stop: int
) -> None:
    groups, n = torch.tensor(ids), len(ids)
    rows = slice(start, stop)
    for whole in (
        Positives(n, torch.arange(n), None, groups, groups),
        Positives(n, torch.arange(n).flip(0), torch.arange(n)),
        Positives(n, None, torch.arange(n), groups, groups),
    ):
        block = whole.block(rows)
        assert torch.equal(block.matches(), whole.matches()[rows])
        assert torch.equal(block.negatives(), whole.negatives()[rows])
        assert torch.equal(block.counts(), whole.counts()[rows])


def test_samples_without_a_group_have_ids_of_their_own_on_all_ranks() -> None:
    raw = [torch.tensor([-100, 4, -1]), torch.tensor([4, -100, -2], dtype=torch.int32)]
    sizes = tuple(len(ids) for ids in raw)
    ids = torch.cat([with_own_groups(x, GlobalBatch(sizes, r)) for r, x in enumerate(raw)])
    alone = [0, 2, 4]
    assert len(set(ids.tolist())) == 5
    assert [int(x) for i, x in enumerate(ids) if i not in alone] == [4, 4, -2]
    assert without_own_groups(ids).tolist() == [-100, 4, -100, 4, -100, -2]


def test_ids_of_eight_bits_are_all_groups() -> None:
    ids = torch.tensor([156, 255, 156], dtype=torch.uint8)  # -100 and -1 in eight bits
    assert with_own_groups(ids, GlobalBatch((3,), 0)).tolist() == [156, 255, 156]


def test_without_groups_only_the_own_pair_matches() -> None:
    positives = Positives(4, torch.tensor([2, 0]))
    assert positives.matches().tolist() == [[False, False, True, False], [True] + [False] * 3]
    assert positives.counts().tolist() == [1, 1]
    assert not positives.grouped


def test_groups_of_different_sets_match_by_id() -> None:
    assert same_group(torch.tensor([1, 2]), torch.tensor([2, 2, 1])).tolist() == [
        [False, False, True],
        [True, True, False],
    ]
