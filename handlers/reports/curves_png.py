"""Charts as one PNG, drawn by matplotlib where the same charts stand in a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.handlers.reports.curves import AXIS, LARGE, WIDTH, Drawing, Label, Line, Place

COLUMNS, MARGIN, HEADING = 4, 12, 30
PIXELS_PER_INCH, SHARPNESS = 72, 2  # at 72 a point is a pixel; two of the picture for each


def check_can_plot() -> None:
    """Check that the package that draws the PNG is there.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise ImportError(
            "curves as PNG need the package matplotlib: pip install 'diptych[plots]'"
        ) from error


def save_charts(charts: Mapping[str, Sequence[Drawing]], path: Path) -> None:
    """Write charts, side by side under their headings, as a PNG; the file is replaced in one step.

    It leaves matplotlib's global state (pyplot, the backend) alone.

    Args:
        charts: heading to the charts under it.
        path: of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    places, headings, height = _placed(charts)
    width = MARGIN + COLUMNS * (WIDTH + MARGIN)
    figure = Figure(
        figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH),
        dpi=PIXELS_PER_INCH * SHARPNESS,
    )
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for label in headings:
        _write(axes, label)
    for drawing, place in places:
        _draw(axes, drawing, place)
    unfinished = path.with_name(f"{path.name}.unfinished")
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(unfinished)
    unfinished.replace(path)


def _placed(
    charts: Mapping[str, Sequence[Drawing]],
) -> tuple[list[tuple[Drawing, Place]], list[Label], int]:
    """Return each chart's upper left corner, the headings, and the height of them all."""
    places, headings, y = list[tuple[Drawing, Place]](), list[Label](), MARGIN
    for heading, drawings in charts.items():
        headings.append(Label(heading, (MARGIN, y + LARGE + 4), size=LARGE + 4))
        y += HEADING
        for start in range(0, len(drawings), COLUMNS):
            row = drawings[start : start + COLUMNS]
            xs = (MARGIN + column * (WIDTH + MARGIN) for column in range(COLUMNS))
            places += [(drawing, (x, y)) for drawing, x in zip(row, xs, strict=False)]
            y += max(drawing.height for drawing in row) + MARGIN
    return places, headings, y


def _draw(axes: Any, drawing: Drawing, corner: Place) -> None:
    from matplotlib.collections import LineCollection  # noqa: PLC0415

    lines = [Line("axis", AXIS, drawing.axis), *drawing.lines]
    long = [line for line in lines if len(line.places) > 1]
    curves = [[_moved(place, corner) for place in line.places] for line in long]
    colors = [line.color for line in long]
    axes.add_collection(LineCollection(curves, colors=colors, linewidths=1.5), autolim=False)
    for line in lines:
        if len(line.places) == 1:
            axes.plot(*_moved(line.places[0], corner), "o", color=line.color, markersize=4)
    for label in drawing.labels:
        _write(axes, label, corner)


def _write(axes: Any, label: Label, corner: Place = (0, 0)) -> None:
    axes.text(
        *_moved(label.place, corner),
        label.text,
        color=label.color,
        fontsize=label.size,
        horizontalalignment="right" if label.ends else "left",
        parse_math=False,  # a tag may hold a dollar sign
    )


def _moved(place: Place, by: Place) -> Place:
    return place[0] + by[0], place[1] + by[1]
