"""Validators of constructor arguments: the messages for values out of range."""

from __future__ import annotations

import math
from typing import Any, Literal

import attrs
import pytest

from diptych.handlers import EarlyStopping
from diptych.handlers.argument_checks import (
    Validator,
    not_negative,
    number,
    one_of,
    positive,
    share_below_one,
)


def check(validator: Validator, value: Any) -> None:
    attrs.make_class("Checked", {"size": attrs.field(validator=validator)})(value)


@pytest.mark.parametrize(
    ("validator", "good", "bad", "message"),
    [
        (positive, (1e-9, 1e9), (0, -1, math.inf, math.nan), "size must be > 0 and finite, got"),
        (not_negative, (0, 1e9), (-1, math.inf, math.nan), "size must be >= 0 and finite, got"),
        (share_below_one, (0, 0.999), (-0.1, 1, math.nan), r"size must lie in \[0, 1\), got"),
        (number("be 3", lambda value: value == 3), (3,), (4,), "size must be 3, got 4"),
        (one_of(Literal["a", "b"]), ("a", "b"), ("c", 1), "size must be one of a, b, got"),
    ],
)
def test_a_validator_accepts_values_in_range_and_names_others(validator, good, bad, message):
    for value in good:
        check(validator, value)
    for value in bad:
        with pytest.raises(ValueError, match=message):
            check(validator, value)


def test_a_guess_of_what_is_better_is_logged_once_with_the_way_out(caplog):
    known = {"val/loss": "min", "val/i2t/recall@5": "max", "val/knn_accuracy": "max"}
    for metric, mode in known.items():
        assert EarlyStopping(metric=metric).mode == mode
        assert EarlyStopping(metric="val/guessed", mode="min").mode == "min"
    assert not caplog.messages
    assert [EarlyStopping(metric="val/guessed").mode for _ in range(2)] == ["max"] * 2
    (line,) = caplog.messages
    assert line.startswith("metric='val/guessed' does not say whether more is better: a larger ")
    assert "pass mode='min'" in line
