"""Checks of what enters a loss: shapes and dtypes only, so that no device is synchronised."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
"""The dtypes of half precision."""


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless a tensor is floating point."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {tensor.dtype}; convert it with .float()"
        )


def check_features(name: str, features: Tensor) -> None:
    """Raise unless features are floating point [B, D] with D > 0."""
    check_floating(name, features)
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(
            f"{name} must be [batch, features], got shape {tuple(features.shape)};"
            " pool or flatten each sample to one vector"
        )


def check_pair(names: tuple[str, str], first: Tensor, second: Tensor) -> None:
    """Raise unless two sides are floating point [B, D] of equal shape."""
    check_features(names[0], first)
    check_features(names[1], second)
    if first.shape != second.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have equal shapes, one row for each pair, got"
            f" {tuple(first.shape)} and {tuple(second.shape)}"
        )


def check_groups(name: str, groups: Tensor, size: int) -> None:
    """Raise unless group ids (or class labels) are integers [B]."""
    if not isinstance(groups, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(groups).__name__}")
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {groups.dtype}; convert them with .long()")
    if groups.shape != (size,):
        raise ValueError(
            f"{name} must be [batch] with batch = {size}, got shape {tuple(groups.shape)}"
        )


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless a number is finite and > 0."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be > 0, got {value}")


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Raise ValueError unless a number is finite and >= a minimum."""
    if not (math.isfinite(value) and value >= minimum):
        raise ValueError(f"{name} must be >= {minimum:g}, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a word is one of the choices."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any floating tensor is float64, else float32: what losses compute in."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32
