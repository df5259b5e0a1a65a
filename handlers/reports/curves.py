"""Charts of curves: their layout in pixels, and the layout as SVG.

The SVG takes its colours from the page: the text's colour, `--axis`, `--grid`, and `--c0` to `--c7`
for the curves. A page that sets none of them gets those of a light page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal

import attrs

SVG = "http://www.w3.org/2000/svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 200, 52, 14, 24, 24
LEGEND_LINE, LETTER = 13, 5.6  # height of a legend's line and mean width of a letter, in pixels
INK, AXIS, GRID = "#222222", "#999999", "#e4e4e4"
SMALL, LARGE = 10, 12  # heights of letters, in pixels
COLORS = ("#3949ab", "#e65100", "#2e7d32", "#8e24aa", "#00838f", "#c62828", "#6d4c41", "#546e7a")
POINTS = 400  # of a curve; more cannot be distinguished
MARGIN = 0.04  # above and below the curves, as a share of their range
TINY = 1e-300  # a smaller distance has no power of ten below it
INTERVALS = 3  # between the marks of an axis, at least; at most two and a half times as many

StepAndValue = tuple[int, float]
Curve = Sequence[StepAndValue]
Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]


@attrs.frozen
class Label:
    """A text of a chart.

    Attributes:
        text: the text.
        point: on its base line.
        color: of the letters.
        size: height of the letters, in pixels.
        anchor: whether the text starts at the point, ends there, or is centred on it.
    """

    text: str
    point: Point
    color: str = INK
    size: int = SMALL
    anchor: Anchor = "start"


@attrs.frozen
class Line:
    """A piece of a curve, a single point included."""

    name: str
    color: str
    points: list[Point]


@attrs.frozen
class ChartDrawing:
    """The layout of a chart, in pixels to the right of and below its upper left corner.

    Attributes:
        title: also one of the labels.
        height: in pixels; the width is `WIDTH`.
        labels: the title, the legend, and the marks of both axes.
        axis: the corners of the axes: down, then to the right.
        grid: a line for each mark of the axis of values.
        lines: the curves.
    """

    title: str
    height: int
    labels: list[Label]
    axis: list[Point]
    grid: list[list[Point]]
    lines: list[Line]


def draw_chart(title: str, curves: Mapping[str, Curve], legend: Sequence[str] = ()) -> ChartDrawing:
    """Return the layout of a chart; values that are not finite leave a gap.

    Args:
        title: of the chart.
        curves: name to steps and values, in order.
        legend: the names under the title, in the order of the curves; empty: no legend.
    """
    keys, top = _legend(legend, TOP)
    bottom, end = top + HEIGHT - TOP - BOTTOM, WIDTH - RIGHT
    (first, last), (low, high) = _ranges(curves)
    low, high = low - MARGIN * (high - low), high + MARGIN * (high - low)

    def at(x: float, y: float) -> Point:
        right = LEFT + (end - LEFT) * (x - first) / ((last - first) or 1)
        share = (y - low) / (high - low) if high > low else 0.5
        return right, bottom - (bottom - top) * share

    heights = {value: at(first, value)[1] for value in _marks(low, high)}
    steps = {step: at(step, low)[0] for step in _marks(first, last, least=1.0)}
    labels = [
        Label(title, (LEFT, 14), size=LARGE),
        *keys,
        *_labels_of_values(heights),
        *_labels_of_steps(steps, bottom + 14),
    ]
    lines = [
        Line(name, color_of(number), [at(x, y) for x, y in piece])
        for number, (name, curve) in enumerate(curves.items())
        for piece in _pieces(_thinned(curve))
    ]
    axis: list[Point] = [(LEFT, top), (LEFT, bottom), (end, bottom)]
    grid: list[list[Point]] = [[(LEFT, y), (end, y)] for y in heights.values()]
    return ChartDrawing(title, bottom + BOTTOM, labels, axis, grid, lines)


def _labels_of_values(heights: Mapping[float, float]) -> list[Label]:
    return [Label(_short_number(v), (LEFT - 5, y + 3), anchor="end") for v, y in heights.items()]


def _labels_of_steps(places: Mapping[float, float], height: float) -> list[Label]:
    marks = [Label(f"{s:,.0f}", (x, height), anchor="middle") for s, x in places.items()]
    return [*marks, Label("step", (LEFT - 22, height), AXIS, anchor="end")]


def _marks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Return round numbers in a range, at equal distances of at least `least`; or its only one."""
    width = (high - low) / INTERVALS
    if not max(abs(high) * 1e-12, TINY) < width < math.inf:
        return [low]
    unit = 10.0 ** math.floor(math.log10(width))
    distance = max(least, *(unit * m for m in (1, 2, 5) if unit * m <= width))
    numbers = range(math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9) + 1)
    return [number * distance for number in numbers]


def color_of(number: int) -> str:
    """Return the colour of a chart's curve by its number, from 0."""
    return COLORS[number % len(COLORS)]


def svg(drawing: ChartDrawing) -> str:
    """Return a chart as SVG; pointing at a curve shows its name."""
    parts = [
        f'<svg xmlns="{SVG}" viewBox="0 0 {WIDTH} {drawing.height}" role="img">',
        f"<title>{escape(drawing.title)}</title>",
        *(_stroke(points, GRID, 'stroke-width="1"') for points in drawing.grid),
        _stroke(drawing.axis, AXIS, 'stroke-width="1"'),
        *map(_text, drawing.labels),
        *map(_line, drawing.lines),
    ]
    return "\n".join([*parts, "</svg>"])


def _text(label: Label) -> str:
    x, y = label.point
    anchor = "" if label.anchor == "start" else f' text-anchor="{label.anchor}"'
    style = f'font-size="{label.size}" fill="{_paint(label.color)}"{anchor}'
    return f'<text x="{x:.4g}" y="{y:.4g}" {style}>{escape(label.text)}</text>'


def _line(line: Line) -> str:
    name = f"<title>{escape(line.name)}</title>"
    if len(line.points) == 1:
        ((x, y),) = line.points
        color = _paint(line.color)
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}">{name}</circle>'
    return _stroke(line.points, line.color, 'class="curve" stroke-width="1.5"', name)


def _stroke(points: Sequence[Point], color: str, style: str, inside: str = "") -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    end = f">{inside}</polyline>" if inside else "/>"
    return f'<polyline points="{joined}" fill="none" stroke="{_paint(color)}" {style}{end}'


def _paint(color: str) -> str:
    """Return a colour of a drawing as the page's colour for it."""
    if color in COLORS:
        return f"var(--c{COLORS.index(color)},{color})"
    return {AXIS: f"var(--axis,{AXIS})", GRID: f"var(--grid,{GRID})"}.get(color, "currentColor")


def _short_number(value: float) -> str:
    """Return a number as text that fits beside an axis."""
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"


def _legend(names: Sequence[str], top: int) -> tuple[list[Label], int]:
    """Return the legend's labels, starting at a height, and the height where they end."""
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


def _thinned(curve: Curve) -> list[StepAndValue]:
    """Return at most `POINTS` points: first and last, and the extremes and gaps of equal parts."""
    points = [(int(x), float(y)) for x, y in curve]
    if len(points) <= POINTS:
        return points
    part = math.ceil(len(points) / ((POINTS - 2) // 3))
    kept = [extremes(points[start : start + part]) for start in range(0, len(points), part)]
    picked = [point for points_of_part in kept for point in points_of_part]
    first = [points[0]] if picked[0] != points[0] else []
    last = [points[-1]] if picked[-1] != points[-1] else []
    return [*first, *picked, *last]


def extremes(points: Sequence[StepAndValue]) -> list[StepAndValue]:
    """Return the lowest, the highest and the first not finite one of some points, in order."""
    if len(points) < 2:
        return list(points)
    finite = [index for index, (_, value) in enumerate(points) if math.isfinite(value)]
    kept = {index for index, (_, value) in enumerate(points) if not math.isfinite(value)}
    kept = {min(kept)} if kept else set()
    if finite:
        kept.add(min(finite, key=lambda index: points[index][1]))
        kept.add(max(finite, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(kept)]


def _pieces(curve: Curve) -> list[list[tuple[int, float]]]:
    """Return the parts of a curve between its values that are not finite."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for x, y in curve:
        if math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
