"""Conversion of settings and numbers to JSON values."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def as_json(value: Any) -> Any:
    """Return a value as JSON; an object that JSON cannot hold becomes the name of its class."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return as_json(value.item())
    return json_number(value) if isinstance(value, float) else _as_word(value)


def _as_word(value: Any) -> Any:
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, (os.PathLike, torch.device, torch.dtype)):
        return str(value)
    return getattr(value, "__qualname__", None) or class_name(value)


def class_name(instance: object) -> str:
    """Return the module and the name of an object's class."""
    kind = type(instance)
    return f"{kind.__module__}.{kind.__qualname__}"


def json_number(value: float) -> float | str:
    """Return a number as JSON: a string instead of NaN or an infinity."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
