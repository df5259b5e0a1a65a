"""Curves as charts: what stands where in each, and the same as SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import attrs

SVG = "http://www.w3.org/2000/svg"
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 180, 56, 24, 22
LEGEND_LINE, LETTER = 13, 5.6  # pixels of a legend's line, and about as many of a letter in it
INK, AXIS = "#222222", "#bbbbbb"
SMALL, LARGE = 10, 12  # pixels of a letter's height
COLORS = ("#3949ab", "#e65100", "#2e7d32", "#8e24aa", "#00838f", "#c62828", "#6d4c41", "#546e7a")
POINTS = 400  # of a curve; more cannot be told apart

Curve = Sequence[tuple[int, float]]
Place = tuple[float, float]


@attrs.frozen
class Label:
    """A text of a chart; `place` is where its base line starts or, with `ends`, where it ends."""

    text: str
    place: Place
    color: str = INK
    size: int = SMALL
    ends: bool = False


@attrs.frozen
class Line:
    """A piece of a curve, a single point included."""

    name: str
    color: str
    places: list[Place]


@attrs.frozen
class Drawing:
    """A chart, laid out: pixels to the right and downwards from its upper left corner.

    Attributes:
        title: in words, also among the labels.
        height: in pixels; the width is `WIDTH`.
        labels: title, legend, and the ends of both axes.
        axis: down, then to the right.
        lines: the curves.
    """

    title: str
    height: int
    labels: list[Label]
    axis: list[Place]
    lines: list[Line]


def draw(title: str, curves: Mapping[str, Curve], legend: Sequence[str] = ()) -> Drawing:
    """Return curves laid out as a chart; values that are not finite leave a gap.

    Args:
        title: above it.
        curves: name to steps and values, in order.
        legend: what the curves are called under the title, in their order; empty: nothing there.
    """
    keys, top = _legend(legend, TOP)
    bottom = top + HEIGHT - TOP - BOTTOM
    (first, last), (low, high) = _ranges(curves)

    def place(x: float, y: float) -> Place:
        right = LEFT + (WIDTH - LEFT - 8) * (x - first) / ((last - first) or 1)
        share = (y - low) / (high - low) if high > low else 0.5
        return right, bottom - (bottom - top) * share

    labels = [
        Label(title, (LEFT, 14), size=LARGE),
        *keys,
        Label(_short(high), (LEFT - 4, top + 8), ends=True),
        Label(_short(low), (LEFT - 4, bottom), ends=True),
        Label(f"{first:g}", (LEFT, bottom + 14)),
        Label(f"{last:g}", (WIDTH - 8, bottom + 14), ends=True),
    ]
    lines = [
        Line(name, color_of(number), [place(x, y) for x, y in piece])
        for number, (name, curve) in enumerate(curves.items())
        for piece in _pieces(_thinned(curve))
    ]
    axis: list[Place] = [(LEFT, top), (LEFT, bottom), (WIDTH - 8, bottom)]
    return Drawing(title, bottom + BOTTOM, labels, axis, lines)


def color_of(number: int) -> str:
    """Return the colour of a chart's curve, counted from 0."""
    return COLORS[number % len(COLORS)]


def svg(drawing: Drawing) -> str:
    """Return a chart as SVG; a curve's name shows under the pointer."""
    corners = " ".join(map(_point, drawing.axis))
    parts = [
        f'<svg xmlns="{SVG}" viewBox="0 0 {WIDTH} {drawing.height}" role="img">',
        f"<title>{escape(drawing.title)}</title>",
        f'<polyline points="{corners}" fill="none" stroke="{AXIS}"/>',
        *map(_text, drawing.labels),
        *map(_line, drawing.lines),
    ]
    return "\n".join([*parts, "</svg>"])


def _text(label: Label) -> str:
    (x, y), anchor = label.place, ' text-anchor="end"' if label.ends else ""
    style = f'font-size="{label.size}" fill="{label.color}"{anchor}'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(label.text)}</text>'


def _line(line: Line) -> str:
    name = f"<title>{escape(line.name)}</title>"
    if len(line.places) == 1:
        ((x, y),) = line.places
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{line.color}">{name}</circle>'
    points = " ".join(map(_point, line.places))
    style = f'fill="none" stroke="{line.color}" stroke-width="1.5"'
    return f'<polyline class="curve" points="{points}" {style}>{name}</polyline>'


def _short(value: float) -> str:
    """Return a number that fits beside an axis."""
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def _point(place: Place) -> str:
    return f"{place[0]:.1f},{place[1]:.1f}"


def _legend(names: Sequence[str], top: int) -> tuple[list[Label], int]:
    """Return the names in lines that start at a height, and the height where they end."""
    labels: list[Label] = []
    x, y = float(LEFT), top
    for number, name in enumerate(names):
        text = f"\N{BLACK SQUARE} {name}"
        width = LETTER * (len(text) + 2)
        if x > LEFT and x + width > WIDTH:
            x, y = float(LEFT), y + LEGEND_LINE
        labels.append(Label(text, (x, y + 4), color_of(number)))
        x += width
    return labels, y + LEGEND_LINE if names else y


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
