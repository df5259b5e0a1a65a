"""Selection and weights of hard negatives."""

import math

import pytest
import torch

from diptych.losses import HardNegatives
from tests.losses.oracles import draw, lse

SIMILARITY = torch.tensor([[0.9, 0.5, 0.1, 0.7], [0.2, 0.8, 0.79, 0.6]])
NEGATIVES = torch.tensor([[False, True, True, True], [True, False, True, True]])
POSITIVE = torch.tensor([0.6, 0.8])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [[1, 2, 3], [0, 2, 3]]),
        ({"select": "hardest"}, [[3], [2]]),
        ({"select": "top_k", "k": 2}, [[1, 3], [2, 3]]),
        ({"select": "top_k", "k": 9}, [[1, 2, 3], [0, 2, 3]]),
        ({"select": "semi_hard"}, [[1], [2, 3]]),
    ],
)
def test_the_right_negatives_are_chosen(
    arguments: dict[str, object], expected: list[list[int]]
) -> None:
    chosen = HardNegatives(**arguments).choose(SIMILARITY, NEGATIVES, POSITIVE, 0.3)  # type: ignore[arg-type]
    assert [row.nonzero()[:, 0].tolist() for row in chosen] == expected


def test_a_row_without_negatives_has_none_chosen() -> None:
    none = torch.zeros(2, 4, dtype=torch.bool)
    for select in ("all", "hardest", "semi_hard"):
        assert not HardNegatives(select=select).choose(SIMILARITY, none, POSITIVE).any()


def test_weights_are_a_softmax_times_the_number_of_negatives() -> None:
    logits = draw(2, 4)
    weights = HardNegatives(beta=0.7).log_weights(logits, NEGATIVES)
    for row, values, mask in zip(weights, logits.tolist(), NEGATIVES.tolist(), strict=True):
        kept = [0.7 * value for value, negative in zip(values, mask, strict=True) if negative]
        expected = [value - lse(kept) + math.log(len(kept)) for value in kept]
        torch.testing.assert_close(row[torch.tensor(mask)].tolist(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        weights.exp()[NEGATIVES].view(2, 3).mean(1), torch.ones(2, dtype=torch.float64)
    )


def test_without_exponent_or_negatives_all_weights_are_one() -> None:
    assert not HardNegatives().log_weights(SIMILARITY, NEGATIVES).any()
    none = torch.zeros(2, 4, dtype=torch.bool)
    logits = SIMILARITY.clone().requires_grad_()
    weights = HardNegatives(beta=1.0).log_weights(logits, none)
    weights.sum().backward()
    assert not weights.any()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"select": "easy"}, "select must be one of"),
        ({"select": "top_k"}, "k must be given if and only if select is 'top_k'"),
        ({"k": 3}, "k must be given if and only if select is 'top_k'"),
        ({"select": "top_k", "k": 0}, "k must be >= 1"),
        ({"beta": -0.1}, "beta must be >= 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardNegatives(**arguments)  # type: ignore[arg-type]


def test_semi_hard_without_the_positive_similarities_is_an_error() -> None:
    with pytest.raises(ValueError, match="positive must be given if select is 'semi_hard'"):
        HardNegatives(select="semi_hard").choose(SIMILARITY, NEGATIVES)
