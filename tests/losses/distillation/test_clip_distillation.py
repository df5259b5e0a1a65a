"""Distillation of a two-tower model against plain loops."""

import math
from functools import partial

import pytest
import torch

from diptych.losses import CLIPDistillationLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import Row, cosine, draw, logits, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

FIRST, SECOND = draw(6, 4), draw(6, 4, seed=1)
TEACHER = draw(6, 4, seed=2), draw(6, 4, seed=3)
SMALLER = draw(6, 3, seed=2), draw(6, 3, seed=3)
GROUPS = torch.tensor([4, 1, 4, 2, 1, 4])


def transposed(rows: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)]


def divergence(target: Row, row: Row) -> float:
    wanted = [math.exp(value - lse(target)) for value in target]
    found = [value - lse(row) for value in row]
    return math.fsum(p * (math.log(p) - q) for p, q in zip(wanted, found, strict=True))


@pytest.mark.parametrize("teacher", [TEACHER, SMALLER])
def test_similarity_is_the_divergence_of_both_directions(
    teacher: tuple[torch.Tensor, torch.Tensor],
) -> None:
    loss = CLIPDistillationLoss(temperature=0.2, teacher_temperature=0.5, learn_temperature=False)
    student, target = logits(FIRST, SECOND, 0.2), logits(*teacher, 0.5)
    both = [(target, student), (transposed(target), transposed(student))]
    expected = mean(divergence(t, s) for side in both for t, s in zip(*side, strict=True))
    assert math.isclose(float(loss(FIRST, SECOND, *teacher)), expected, rel_tol=1e-11)


def test_similarity_is_zero_for_a_student_that_equals_its_teacher() -> None:
    loss = CLIPDistillationLoss(temperature=0.3, teacher_temperature=0.3, learn_temperature=False)
    assert abs(float(loss(*TEACHER, *TEACHER))) < 1e-12


def test_feature_is_the_squared_distance_of_unit_vectors() -> None:
    loss = CLIPDistillationLoss(kind="feature")
    sides = [(FIRST, TEACHER[0]), (SECOND, TEACHER[1])]
    # |a - b|^2 = 2 - 2 cos for unit vectors.
    expected = mean(
        2 - 2 * cosine(a, b)
        for student, teacher in sides
        for a, b in zip(student.tolist(), teacher.tolist(), strict=True)
    )
    assert math.isclose(float(loss(FIRST, SECOND, *TEACHER)), expected, rel_tol=1e-12)
    assert list(loss.parameters()) == []


def test_interactive_contrasts_the_student_with_its_teacher() -> None:
    loss = CLIPDistillationLoss(kind="interactive", temperature=0.2, learn_temperature=False)
    across = [logits(FIRST, TEACHER[1], 0.2), logits(SECOND, TEACHER[0], 0.2)]
    expected = mean(lse(row) - row[i] for rows in across for i, row in enumerate(rows))
    assert math.isclose(float(loss(FIRST, SECOND, *TEACHER)), expected, rel_tol=1e-12)


@pytest.mark.parametrize("kind", ["feature", "interactive"])
def test_every_kind_keeps_the_contract_on_ranks_too(kind: str, ranks: Ranks) -> None:
    build = partial(CLIPDistillationLoss, kind=kind)
    check_loss(build)
    inputs = (FIRST, SECOND, *TEACHER, GROUPS)
    assert_same_on_ranks(ranks, build, inputs, splits=[(1, 3, 2)])
    with pytest.raises(ValueError, match="Add a Projection to the student"):
        build()(FIRST, SECOND, *SMALLER)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of 'similarity'"):
        CLIPDistillationLoss(kind="logits")
    with pytest.raises(ValueError, match="teacher_temperature must be > 0"):
        CLIPDistillationLoss(teacher_temperature=0.0)
    with pytest.raises(ValueError, match="teacher_second must have a row for each of 6 pairs"):
        CLIPDistillationLoss()(FIRST, SECOND, *(side[:5] for side in TEACHER))
