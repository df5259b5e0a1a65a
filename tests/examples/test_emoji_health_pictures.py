"""The script that draws the health of good and bad runs."""

from __future__ import annotations

import re
import sys

import pytest

from diptych.handlers import Finding
from examples.emoji import health
from examples.emoji.curves import CHARTS, HEIGHT, TOP, picture

RECORDS = [
    (step, {tag: value for chart in CHARTS for tag in chart.curves.values()})
    for step, value in ((5, -3.0), (10, 0.5), (15, 7.0))
]


def test_every_curve_stays_within_its_chart():
    svg = picture(RECORDS, [])
    points = re.findall(r'<polyline points="([^"]+)"', svg)
    assert len(points) == sum(len(chart.curves) for chart in CHARTS)
    heights = [float(y) for y in re.findall(r",([\d.]+)", " ".join(points))]
    assert min(heights) == TOP
    assert max(heights) == TOP + HEIGHT
    assert "nothing found" in svg


def test_what_was_found_is_named_and_marked():
    svg = picture(RECORDS, [Finding("a < b", 10, "seen", "None.")])
    assert "a &lt; b (iteration 10)" in svg
    assert svg.count("stroke-dasharray") == len(CHARTS)


def test_a_value_that_a_run_does_not_publish_has_no_points():
    records = [(step, {"health/auroc": 0.5}) for step, _ in RECORDS]
    assert '<polyline points=""' in picture(records, [])


# The rules have too little to go by after 12 updates, and see what stands still after 25.
@pytest.mark.parametrize(("fault", "iterations"), [("healthy", 12), ("frozen_tower", 25)])
def test_the_script_writes_a_picture_for_each_fault(
    fault, iterations, emoji, tmp_path, monkeypatch
):
    monkeypatch.setattr(health, "read_emoji", lambda: emoji[::12])
    monkeypatch.setattr(health, "FAULTS", {fault: health.FAULTS[fault]})
    monkeypatch.setattr(health, "WARMUP", 1)
    monkeypatch.setattr(health, "BATCH_SIZE", 16)
    flags = ["--iterations", str(iterations), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["health", *flags])
    health.main()
    svg = (tmp_path / f"health_{fault}.svg").read_text("utf-8")
    found = "frozen tower (iteration" if fault == "frozen_tower" else "nothing found"
    assert found in svg
    assert len(svg) < 60_000


def test_every_fault_has_its_picture_in_the_guide():
    drawn = {path.stem for path in health.PICTURES.glob("health_*.svg")}
    assert drawn == {f"health_{fault}" for fault in health.FAULTS}
