"""Checks of integer arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs


def is_whole(value: object, least: int = 1) -> bool:
    """Return whether a value is an integer of at least `least`; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def whole_number(
    least: int = 1, *, of: str = ""
) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    """Return an attrs validator for integers.

    Args:
        least: the smallest valid value.
        of: the unit, for the message.

    Raises:
        ValueError: from the validator, if the value is something else.
    """
    counted = f" of {of}" if of else ""

    def check(_: Any, attribute: attrs.Attribute[Any], value: object) -> None:
        if not is_whole(value, least):
            raise ValueError(
                f"{attribute.name} must be a whole number{counted} >= {least}, got {value!r}"
            )

    return check
