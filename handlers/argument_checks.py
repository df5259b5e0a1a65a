"""Validators of constructor arguments: a number in a range, one of several words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import attrs

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


positive = number("be > 0 and finite", lambda value: 0 < value < math.inf)
not_negative = number("be >= 0 and finite", lambda value: 0 <= value < math.inf)
share_below_one = number("lie in [0, 1)", lambda value: 0 <= value < 1)
