"""GIST against a plain loop over candidates."""

import math

import pytest
import torch

from diptych.losses import GISTLoss
from tests.losses.oracles import cosine, draw, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

FIRST, SECOND = draw(6, 4), draw(6, 4, seed=1)
TEACHER = draw(6, 3, seed=2), draw(6, 3, seed=2) + 0.7 * draw(6, 3, seed=3)
GROUPS = [0, 1, 0, 2, 1, 3]


def loop(margin: float, groups: list[int]) -> tuple[float, int]:
    """Return the loss and the number of candidates that the teacher drops."""
    f, s, tf, ts = (side.tolist() for side in (FIRST, SECOND, *TEACHER))
    losses, dropped = [], 0
    for i in range(6):
        limit = cosine(tf[i], ts[i]) - margin
        kept = [cosine(f[i], s[i]) / 0.1]
        for j in range(6):
            if groups[j] == groups[i]:
                continue
            pairs = [((f[i], s[j]), (tf[i], ts[j])), ((f[i], f[j]), (tf[i], tf[j]))]
            pairs.append(((s[i], s[j]), (ts[i], ts[j])))
            for student, teacher in pairs:
                if cosine(*teacher) > limit:
                    dropped += 1
                else:
                    kept.append(cosine(*student) / 0.1)
        losses.append(lse(kept) - kept[0])
    return mean(losses), dropped


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_value_is_that_of_the_loop(margin: float) -> None:
    loss = GISTLoss(temperature=0.1, margin=margin)
    for groups in (list(range(6)), GROUPS):
        expected, dropped = loop(margin, groups)
        found = float(loss(FIRST, SECOND, *TEACHER, torch.tensor(groups)))
        assert math.isclose(found, expected, rel_tol=1e-12)
        assert dropped > 5
    alone = float(loss(FIRST, SECOND, *TEACHER))
    assert math.isclose(alone, loop(margin, list(range(6)))[0], rel_tol=1e-12)


def test_the_own_pair_is_kept_whatever_the_margin() -> None:
    value = GISTLoss(margin=5.0)(FIRST, SECOND, *TEACHER)
    assert float(value) == 0.0


def test_a_nan_of_the_teacher_reaches_the_loss_on_ranks_too(ranks: Ranks) -> None:
    assert_same_on_ranks(
        ranks, GISTLoss, (FIRST, SECOND, *TEACHER, torch.tensor(GROUPS)), splits=[(1, 3, 2)]
    )
    teacher = TEACHER[0].clone()
    teacher[4] = math.nan
    assert math.isnan(float(GISTLoss()(FIRST, SECOND, teacher, TEACHER[1])))


def test_a_negative_margin_is_refused() -> None:
    with pytest.raises(ValueError, match="margin must be >= 0"):
        GISTLoss(margin=-0.1)
