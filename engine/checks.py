"""Numbers: checks of integer arguments, and results that are a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import attrs
import numpy as np
from torch import Tensor


def is_whole(value: object, least: int = 1) -> bool:
    """Return whether a value is an integer of at least `least`; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def whole_number(
    least: int = 1, *, of: str = ""
) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    """Return an attrs validator for integers.

    `of` is the unit, for the message.

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


def as_number(value: Any) -> float | None:
    """Return a number, or a tensor of one, as a float; None for anything else."""
    is_scalar = isinstance(value, Tensor) and value.numel() == 1
    return float(value) if is_scalar or isinstance(value, (Real, np.bool_)) else None


def numbers_in(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the results that are one number, as floats."""
    found = {name: as_number(value) for name, value in results.items()}
    return {name: number for name, number in found.items() if number is not None}
