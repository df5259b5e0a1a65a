"""MarginMSE against a plain loop."""

import math

import pytest

from diptych.losses import MarginMSELoss
from tests.losses.oracles import cosine, dot, draw, mean

QUERY, POSITIVE, NEGATIVES = draw(6, 4), draw(6, 4, seed=1), draw(6, 3, 4, seed=2)
MARGINS = draw(6, 3, seed=3)


@pytest.mark.parametrize("normalize", [False, True])
def test_value_is_that_of_the_loop_for_one_negative_and_for_several(normalize: bool) -> None:
    similarity = cosine if normalize else dot
    loss = MarginMSELoss(normalize=normalize)
    rows = zip(*(x.tolist() for x in (QUERY, POSITIVE, NEGATIVES, MARGINS)), strict=True)
    errors = [
        [(similarity(q, p) - similarity(q, n) - m) ** 2 for n, m in zip(ns, ms, strict=True)]
        for q, p, ns, ms in rows
    ]
    several = mean(error for row in errors for error in row)
    found = float(loss(QUERY, POSITIVE, NEGATIVES, MARGINS))
    assert math.isclose(found, several, rel_tol=1e-12)
    found = float(loss(QUERY, POSITIVE, NEGATIVES[:, 1], MARGINS[:, 1]))
    assert math.isclose(found, mean(row[1] for row in errors), rel_tol=1e-12)


def test_margins_must_fit_the_negatives() -> None:
    with pytest.raises(ValueError, match=r"teacher_margins must be \[6, 3\]"):
        MarginMSELoss()(QUERY, POSITIVE, NEGATIVES, MARGINS[:, :2])
    with pytest.raises(ValueError, match=r"negatives must be \[6, 4\] or \[6, k, 4\]"):
        MarginMSELoss()(QUERY, POSITIVE, NEGATIVES[:5], MARGINS[:5])
