"""Constructor arguments: a number in a range, one of several words, whether more is better."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, get_args

import attrs

from diptych.engine.distributed.collectives import rank

logger = logging.getLogger(__name__)

Mode = Literal["max", "min"]
"""Whether a larger or a smaller value of a metric is better."""

SMALLER_IS_BETTER = ("loss", "mean_rank", "median_rank")
"""The ends of the names of metrics of which a smaller value is better, unless the user says so."""

LARGER_IS_BETTER = (
    *("acc", "accuracy", "auc", "auroc", "bleu", "cider", "dice", "f1", "hit", "iou", "map", "mrr"),
    *("ndcg", "precision", "recall", "rouge", "score", "share", "similarity", "top1", "top5"),
)
"""The beginnings and ends of the names of metrics of which a larger value surely is better."""

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def number(rule: str, allowed: Callable[[float], bool]) -> Validator:
    """Return an attrs validator for a number.

    Args:
        rule: the end of the message "<argument> must ...".
        allowed: whether a number is in range; False for NaN.

    Raises:
        ValueError: from the validator, with the argument's name, the rule and the value.
    """

    def check(_: Any, attribute: attrs.Attribute[Any], value: float) -> None:
        if not allowed(value):
            raise ValueError(f"{attribute.name} must {rule}, got {value!r}")

    return check


def one_of(literal: Any) -> Validator:
    """Return an attrs validator for the values of a `Literal` type.

    Raises:
        ValueError: from the validator, with the argument's name, the choices and the value.
    """
    choices = get_args(literal)

    def check(_: Any, attribute: attrs.Attribute[Any], value: object) -> None:
        if value not in choices:
            raise ValueError(f"{attribute.name} must be one of {', '.join(choices)}, got {value!r}")

    return check


def usual_mode(metric: str | None, argument: str | None = None) -> Mode:
    """Return the mode of a metric for which none is given: from its name, else "max".

    A guess is logged, once for each metric, if the user has named it through an argument.
    """
    if metric is None or metric.endswith(SMALLER_IS_BETTER):
        return "max" if metric is None else "min"
    name = metric.rpartition("/")[2].lower()
    if argument and not name.startswith(LARGER_IS_BETTER) and not name.endswith(LARGER_IS_BETTER):
        _report_guess(metric, argument)
    return "max"


@lru_cache(maxsize=64)
def _report_guess(metric: str, argument: str) -> None:
    if rank() == 0:
        logger.warning(
            "%s=%r does not say whether more is better: a larger value is taken as the better one."
            "\nIf a smaller one is, pass mode='min'; mode='max' confirms the guess.",
            *(argument, metric),
        )


def improves(value: float, best: float | None, mode: Mode, least: float = 0.0) -> bool:
    """Return whether a value is better than the best one so far by more than `least`; NaN never is.

    Without a best one, every number is.
    """
    if best is None:
        return not math.isnan(value)
    return (value - best if mode == "max" else best - value) > least


positive = number("be > 0 and finite", lambda value: 0 < value < math.inf)
not_negative = number("be >= 0 and finite", lambda value: 0 <= value < math.inf)
share_below_one = number("lie in [0, 1)", lambda value: 0 <= value < 1)
