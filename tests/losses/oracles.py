"""Plain arithmetic on lists of floats, for the expected values of losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Row = Sequence[float]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return float64 normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dot(a: Row, b: Row) -> float:
    """Return the inner product."""
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Row, b: Row) -> float:
    """Return the cosine of the angle between two vectors."""
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def mean(values: Iterable[float]) -> float:
    """Return the arithmetic mean."""
    listed = list(values)
    return math.fsum(listed) / len(listed)


def lse(values: Iterable[float]) -> float:
    """Return log sum exp, for values of moderate size."""
    return math.log(math.fsum(math.exp(value) for value in values))


def logits(first: Tensor, second: Tensor, temperature: float) -> list[list[float]]:
    """Return cosine / temperature of every pair."""
    return [[cosine(a, b) / temperature for b in second.tolist()] for a in first.tolist()]


def covariance(rows: Sequence[Row], ddof: int) -> list[list[float]]:
    """Return the covariance matrix of samples in rows."""
    dims = range(len(rows[0]))
    centre = [mean(row[d] for row in rows) for d in dims]
    return [
        [
            math.fsum((row[i] - centre[i]) * (row[j] - centre[j]) for row in rows)
            / (len(rows) - ddof)
            for j in dims
        ]
        for i in dims
    ]
