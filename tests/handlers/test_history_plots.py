"""The report of a run, and runs side by side: what is in them, and that they open."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from diptych.handlers import HistoryPlots, JsonLines, RunRecord
from diptych.handlers.curves import POINTS, chart
from diptych.handlers.history_plots import differing_settings, final_values, page, read_run
from diptych.handlers.report import main
from tests.handlers.runs import Stop, loader, make_trainer, report_each_epoch, stop_at

POLYLINE = "{http://www.w3.org/2000/svg}polyline"


def run(folder: Path, epochs: int = 2, **settings: object) -> Path:
    trainer = make_trainer(**settings)
    report_each_epoch(trainer, 0.25, 0.75, 0.5)
    trainer.attach(RunRecord(folder), JsonLines(folder), HistoryPlots(folder))
    trainer.run(loader(), max_epochs=epochs)
    return folder


def points(svg: str) -> list[list[tuple[float, float]]]:
    """Return the points of every line of a picture."""
    lines = ET.fromstring(svg).iter(POLYLINE)  # noqa: S314
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]


def test_a_run_leaves_a_report_with_every_tag_and_setting(tmp_path):
    text = (run(tmp_path / "a") / "report.html").read_text("utf-8")

    for tag in ("train/loss", "val/recall@1"):
        assert f"<title>{tag}</title>" in text
    assert "<td>trainer.precision</td><td>fp32</td>" in text
    assert "<script" not in text
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    HTMLParser().feed(text)


def test_a_chart_reaches_from_its_lowest_value_to_its_highest():
    ((first, middle, last),) = points(chart("loss", {"a": [(0, 4.0), (5, 3.0), (10, 2.0)]}))

    assert first[0] < middle[0] < last[0]
    assert first[1] < middle[1] < last[1]  # y points down
    assert middle == pytest.approx([(first[0] + last[0]) / 2, (first[1] + last[1]) / 2], abs=0.1)


def test_values_that_are_not_finite_leave_a_gap():
    curve = [(0, 1.0), (1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0), (5, 2.0)]

    assert [len(line) for line in points(chart("loss", {"a": curve}))] == [2, 2]


def test_long_curves_are_thinned_and_names_are_escaped():
    svg = chart("<loss>", {"a&b": [(step, float(step)) for step in range(10_000)]})

    assert len(points(svg)[0]) <= POINTS
    assert "&lt;loss&gt;" in svg


def test_an_interrupted_run_has_its_report(tmp_path):
    trainer = make_trainer().attach(JsonLines(tmp_path), HistoryPlots(tmp_path, every=50))
    stop_at(trainer, 8)

    with pytest.raises(Stop):
        trainer.run(loader(), max_epochs=3)

    assert "train/loss" in (tmp_path / "report.html").read_text("utf-8")


def test_without_json_lines_the_run_does_not_start(tmp_path):
    trainer = make_trainer().attach(HistoryPlots(tmp_path))

    with pytest.raises(ValueError, match=r"must have a JsonLines .*got none: attach"):
        trainer.run(loader(), max_epochs=1)


def test_the_settings_that_differ_come_first(tmp_path):
    runs = [read_run(run(tmp_path / "a")), read_run(run(tmp_path / "b", microbatch_size=1))]

    different = differing_settings(runs)

    assert different == {"trainer.microbatch_size": [None, 1]}
    text = page(runs)
    assert text.index("trainer.microbatch_size") < text.index("<svg")


def test_the_table_tells_the_last_value_and_the_range(tmp_path):
    rows = final_values([read_run(run(tmp_path / "a", epochs=3))])

    assert rows["val/recall@1"] == ["0.5 (0.25 to 0.75)"]


def test_a_tag_that_one_run_lacks_is_drawn_in_the_others_colour(tmp_path):
    folder = tmp_path / "c"
    make_trainer().attach(JsonLines(folder)).run(loader(), max_epochs=1)
    runs = [read_run(folder), read_run(run(tmp_path / "a"))]

    assert final_values(runs)["val/recall@1"][0] == "-"
    assert "#e65100" in page(runs)


def test_the_command_compares_runs_without_a_warning(tmp_path):
    folders = [run(tmp_path / "a"), run(tmp_path / "b", microbatch_size=1)]
    output = tmp_path / "both.html"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "diptych.handlers.report"]

    done = subprocess.run(
        [*command, "compare", *folders, "--output", output],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "trainer.microbatch_size" in done.stdout
    assert "val/recall@1" in done.stdout
    assert "<svg" in output.read_text("utf-8")


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert f"got {tmp_path}, which holds none" in capsys.readouterr().err
