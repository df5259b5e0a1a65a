"""Curves as pictures in SVG that need nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 180, 52, 24, 22
COLORS = ("#3949ab", "#e65100", "#2e7d32", "#8e24aa", "#00838f", "#c62828", "#6d4c41", "#546e7a")
POINTS = 400  # of a curve; more cannot be told apart

Curve = Sequence[tuple[int, float]]


def chart(title: str, curves: Mapping[str, Curve]) -> str:
    """Return one chart; values that are not finite leave a gap.

    Args:
        title: above it.
        curves: name to steps and values, in order.
    """
    (first, last), (low, high) = _ranges(curves)

    def place(x: float, y: float) -> str:
        right = LEFT + (WIDTH - LEFT - 8) * (x - first) / ((last - first) or 1)
        down = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / ((high - low) or 1)
        return f"{right:.1f},{down:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<text x="{LEFT}" y="14" class="name">{escape(title)}</text>',
        f'<path d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - 8}" class="axis"/>',
        f'<text x="{LEFT - 4}" y="{TOP + 8}" class="end">{high:.4g}</text>',
        f'<text x="{LEFT - 4}" y="{HEIGHT - BOTTOM}" class="end">{low:.4g}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 8}">{first:g}</text>',
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 8}" class="end">{last:g}</text>',
    ]
    for number, (name, curve) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        pieces = [[place(x, y) for x, y in piece] for piece in _pieces(_thinned(curve))]
        parts += [_drawn(name, piece, color) for piece in pieces]
    return "\n".join([*parts, "</svg>"])


def _drawn(name: str, places: Sequence[str], color: str) -> str:
    if len(places) == 1:
        x, _, y = places[0].partition(",")
        return f'<circle cx="{x}" cy="{y}" r="2" fill="{color}"/>'
    return (
        f'<polyline points="{" ".join(places)}" fill="none" stroke="{color}" stroke-width="1.5">'
        f"<title>{escape(name)}</title></polyline>"
    )


def _ranges(curves: Mapping[str, Curve]) -> Sequence[tuple[float, float]]:
    """Return the first and last step, and the lowest and highest value."""
    finite = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    columns = list(zip(*finite, strict=True))
    return [(min(column), max(column)) for column in columns] or [(0.0, 1.0), (0.0, 1.0)]


def _thinned(curve: Curve) -> list[tuple[int, float]]:
    """Return at most `POINTS` points, evenly picked, the last one always."""
    stride = math.ceil(len(curve) / POINTS) if curve else 1
    picked = list(curve[::-1][::stride])[::-1]
    return [(int(x), float(y)) for x, y in picked]


def _pieces(curve: Curve) -> list[list[tuple[int, float]]]:
    pieces: list[list[tuple[int, float]]] = [[]]
    for x, y in curve:
        if math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
