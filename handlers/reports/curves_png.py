"""Charts of curves as a PNG, drawn by matplotlib from the same layout as the report's SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.handlers.files import write_atomically
from diptych.handlers.reports.curves import (
    AXIS,
    GRID,
    LARGE,
    WIDTH,
    ChartDrawing,
    Label,
    Line,
    Point,
)

COLUMNS, MARGIN, HEADING = 4, 12, 30
ALIGNMENT = {"start": "left", "middle": "center", "end": "right"}
PIXELS_PER_INCH, SHARPNESS = 72, 2  # at 72 a point is a pixel; drawn with two pixels for each


def save_charts(charts: Mapping[str, Sequence[ChartDrawing]], path: Path) -> None:
    """Write charts, side by side under their headings, as a PNG; atomically.

    matplotlib's global state (pyplot, the backend) stays as it is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    placed, headings, height = _placed(charts)
    width = MARGIN + COLUMNS * (WIDTH + MARGIN)
    figure = Figure(
        figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH * SHARPNESS
    )
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for label in headings:
        _write(axes, label)
    for drawing, corner in placed:
        _draw(axes, drawing, corner)
    canvas: Any = FigureCanvasAgg(figure)
    write_atomically(path, canvas.print_png)


def _placed(
    charts: Mapping[str, Sequence[ChartDrawing]],
) -> tuple[list[tuple[ChartDrawing, Point]], list[Label], int]:
    """Return the charts with their upper left corners, the headings, and the total height."""
    placed, headings, y = list[tuple[ChartDrawing, Point]](), list[Label](), MARGIN
    for heading, drawings in charts.items():
        headings.append(Label(heading, (MARGIN, y + LARGE + 4), size=LARGE + 4))
        y += HEADING
        for start in range(0, len(drawings), COLUMNS):
            row = drawings[start : start + COLUMNS]
            xs = (MARGIN + column * (WIDTH + MARGIN) for column in range(COLUMNS))
            placed += [(drawing, (x, y)) for drawing, x in zip(row, xs, strict=False)]
            y += max(drawing.height for drawing in row) + MARGIN
    return placed, headings, y


def _draw(axes: Any, drawing: ChartDrawing, corner: Point) -> None:
    from matplotlib.collections import LineCollection  # noqa: PLC0415

    grid = [Line("mark", GRID, points) for points in drawing.grid]
    lines = [*grid, Line("axis", AXIS, drawing.axis), *drawing.lines]
    long = [line for line in lines if len(line.points) > 1]
    curves = [[_moved(point, corner) for point in line.points] for line in long]
    colors = [line.color for line in long]
    axes.add_collection(LineCollection(curves, colors=colors, linewidths=1.5), autolim=False)
    for line in lines:
        if len(line.points) == 1:
            axes.plot(*_moved(line.points[0], corner), "o", color=line.color, markersize=4)
    for label in drawing.labels:
        _write(axes, label, corner)


def _write(axes: Any, label: Label, corner: Point = (0, 0)) -> None:
    axes.text(
        *_moved(label.point, corner),
        label.text,
        color=label.color,
        fontsize=label.size,
        horizontalalignment=ALIGNMENT[label.anchor],
        parse_math=False,  # a tag may contain a dollar sign
    )


def _moved(point: Point, by: Point) -> Point:
    return point[0] + by[0], point[1] + by[1]
