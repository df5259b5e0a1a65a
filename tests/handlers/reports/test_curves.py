"""Charts: their layout, and the same layout in SVG and in the PNG."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from diptych.handlers.reports.curves import COLORS, POINTS, SVG, WIDTH, draw_chart, svg
from diptych.handlers.reports.curves_png import COLUMNS, HEADING, MARGIN, SHARPNESS, save_charts

CURVE = [(0, 4.0), (5, 3.0), (10, 2.0)]
PNG = """
import sys
from pathlib import Path
from diptych.handlers.reports.curves import draw_chart
from diptych.handlers.reports.curves_png import save_charts
chart = draw_chart("tag_$1$", {"a": [(0, 1.0), (5, 2.0)]}, ["a"])
save_charts({"a $ heading": [chart]}, Path(sys.argv[1]))
print("matplotlib.pyplot" in sys.modules)
"""


def points(picture: str) -> list[list[tuple[float, float]]]:
    """Return the points of every curve of a picture."""
    lines = ET.fromstring(picture).iter(f"{{{SVG}}}polyline")  # noqa: S314
    drawn = [line.get("points") for line in lines if line.get("class") == "curve"]
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in drawn]


def test_a_chart_reaches_from_its_lowest_value_to_its_highest():
    ((first, middle, last),) = points(svg(draw_chart("loss", {"a": CURVE})))

    assert first[0] < middle[0] < last[0]
    assert first[1] < middle[1] < last[1]  # y points down
    assert middle == pytest.approx([(first[0] + last[0]) / 2, (first[1] + last[1]) / 2], abs=0.1)


@pytest.mark.parametrize(
    ("low", "high", "steps", "values", "marks"),
    [
        (
            0.0,
            1.0,
            100,
            ["0", "0.2", "0.4", "0.6", "0.8", "1"],
            ["0", "20", "40", "60", "80", "100"],
        ),
        (1.0, 4000.0, 2, ["0", "1000", "2000", "3000", "4000"], ["0", "1", "2"]),
        (-0.3, -0.3, 0, ["-0.3"], ["0"]),
        (0.0, 1.5e-323, 2, ["0"], ["0", "1", "2"]),
        (
            -1e308,
            1e308,
            10**6,
            None,
            ["0", "200,000", "400,000", "600,000", "800,000", "1,000,000"],
        ),
    ],
)
def test_the_axes_have_a_few_round_numbers(low, high, steps, values, marks):
    drawing = draw_chart("x", {"a": [(0, low), (steps, high)]})

    ends = [label.text for label in drawing.labels if label.anchor == "end"]
    assert ends[-1] == "step"
    assert values in (None, ends[:-1])
    assert [label.text for label in drawing.labels if label.anchor == "middle"] == marks
    assert len(drawing.grid) == len(ends) - 1


def test_values_that_are_not_finite_leave_a_gap():
    curve = [(0, 1.0), (1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0), (5, 2.0)]

    assert [len(line) for line in points(svg(draw_chart("loss", {"a": curve})))] == [2, 2]


def test_a_constant_is_drawn_half_way_up():
    drawing = draw_chart("loss", {"a": [(0, 2.0), (5, 2.0)]})

    (_, top), (_, bottom), _ = drawing.axis
    assert {y for _, y in drawing.lines[0].points} == {(top + bottom) / 2}


def test_long_curves_are_thinned_and_names_are_escaped():
    picture = svg(draw_chart("<loss>", {"a&b": [(step, float(step)) for step in range(10_000)]}))

    assert len(points(picture)[0]) <= POINTS
    assert "&lt;loss&gt;" in picture
    assert "a&amp;b" in picture


def test_a_legend_breaks_into_lines_and_pushes_the_curves_down():
    names = [f"a rather long name {number}" for number in range(4)]
    plain = draw_chart("loss", dict.fromkeys(names, CURVE))
    named = draw_chart("loss", dict.fromkeys(names, CURVE), names)

    legend = named.labels[1:5]
    assert [label.color for label in legend] == list(COLORS[:4])
    assert [label.point[1] for label in legend] == sorted(label.point[1] for label in legend)
    assert len({label.point[1] for label in legend}) == 2
    assert max(label.point[1] for label in legend) < named.axis[0][1]
    assert named.height - plain.height == named.axis[0][1] - plain.axis[0][1] > 0


def test_the_png_has_each_point_where_the_svg_has_it(tmp_path):
    from PIL import Image

    curve = [(0, 0.0), (1, 0.0), (2, 1.0), (3, 1.0)]  # horizontal at first, at last
    charts = [draw_chart(f"chart {number}", {"a": curve}) for number in range(COLUMNS + 1)]

    save_charts({"heading": charts}, tmp_path / "curves.png")

    ((start, _, _, end),) = points(svg(charts[0]))
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = picture.convert("RGB")
    width, height = MARGIN + COLUMNS * (WIDTH + MARGIN), MARGIN + HEADING
    assert pixels.width == width * SHARPNESS
    assert pixels.height == (height + 2 * (charts[0].height + MARGIN)) * SHARPNESS
    for column, row in [(0, 0), (COLUMNS - 1, 0), (0, 1)]:  # the fifth begins a line
        left = MARGIN + column * (WIDTH + MARGIN)
        top = height + row * (charts[0].height + MARGIN)
        for (x, y), inwards in ((start, 2), (end, -2)):
            place = round((left + x + inwards) * SHARPNESS), round((top + y) * SHARPNESS)
            assert pixels.getpixel(place) == (0x39, 0x49, 0xAB)


def test_the_png_leaves_pyplot_and_its_figures_alone_and_warns_of_nothing(tmp_path: Path):
    command = [sys.executable, "-W", "error::UserWarning", "-c", PNG, tmp_path / "curves.png"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.stdout.strip(), done.stderr) == ("False", "")
