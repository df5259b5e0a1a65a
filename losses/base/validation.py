"""Checks of a loss's inputs: only shapes and dtypes, so that no check waits for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
"""The half-precision dtypes."""


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless a tensor is floating point."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        way_out = "Convert it with .float()."
        if tensor.dim() == 1:  # what a task for classification returns
            way_out = (
                "One integer a sample is a label or an id: a loss that takes labels is "
                "CrossEntropyLoss or SupervisedContrastiveLoss; ids of matching samples are groups."
            )
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}. {way_out}")


def check_features(name: str, features: Tensor) -> None:
    """Raise unless features are floating point [B, D] with D > 0."""
    check_floating(name, features)
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(
            f"{name} must be [batch, features], got shape {tuple(features.shape)}."
            " Pool or flatten each sample to one vector."
        )


def check_pair(names: tuple[str, str], first: Tensor, second: Tensor) -> None:
    """Raise unless two sides are floating point [B, D] of equal shape."""
    check_features(names[0], first)
    check_features(names[1], second)
    if first.shape != second.shape:
        way_out = "All parts of a batch need as many samples."
        if len(first) == len(second):
            way_out = "Project both sides to one number of features."
        raise ValueError(
            f"{names[0]} and {names[1]} must have equal shapes, one row for each pair, got"
            f" {tuple(first.shape)} and {tuple(second.shape)}. {way_out}"
        )


def check_views(name: str, features: Tensor, middle: str = "views") -> None:
    """Raise unless features are floating point [B, D] or [B, V, D] with V, D > 0."""
    check_floating(name, features)
    if features.dim() not in (2, 3) or 0 in features.shape[1:]:
        raise ValueError(
            f"{name} must be [batch, features] or [batch, {middle}, features], got shape"
            f" {tuple(features.shape)}"
        )


def check_two_views(
    names: tuple[str, str], first: Tensor, second: Tensor, middle: str = "views"
) -> None:
    """Raise unless two sides pass `check_views` and agree in batch and features."""
    check_views(names[0], first, middle)
    check_views(names[1], second, middle)
    if (first.shape[0], first.shape[-1]) != (second.shape[0], second.shape[-1]):
        raise ValueError(
            f"{names[0]} and {names[1]} must agree in batch and features, got"
            f" {tuple(first.shape)} and {tuple(second.shape)}"
        )


def check_integers(name: str, ids: Tensor | None) -> None:
    """Raise TypeError unless a value is a tensor of integers."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {ids.dtype}. Convert them with .long().")


def check_groups(name: str, groups: Tensor | None, size: int) -> None:
    """Raise unless group ids, or class labels, are integers [B], or None."""
    if groups is None:
        return
    check_integers(name, groups)
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


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless a number lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which losses compute: float64 if any tensor is float64, else float32."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32
