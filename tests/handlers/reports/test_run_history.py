"""Histories of runs: bounded curves that keep their extremes, and files that are damaged."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import pytest
from ignite.engine import Events

from diptych.handlers import HistoryPlots, JsonLines
from diptych.handlers.reports.comparison import final_values
from diptych.handlers.reports.curves import POINTS, draw_chart
from diptych.handlers.reports.page import page
from diptych.handlers.reports.run_history import (
    MOST_BUCKETS,
    BoundedCurve,
    RunHistory,
    RunReader,
    read_run,
)
from diptych.handlers.run_directory import RunDirectory
from tests.handlers.runs import loader, make_trainer, reported_run

LONGEST = 3 * MOST_BUCKETS + 1


def curve_of(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    curve = BoundedCurve()
    for point in points:
        curve.add(point)
    return curve.points


def random_points(count: int, seed: int) -> list[tuple[int, float]]:
    draw = random.Random(seed)
    return [(step, draw.gauss(0, 1)) for step in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 511, 512, 513, 5000, 70_001])
def test_a_curve_keeps_a_bounded_number_of_points_with_extremes_and_ends(count):
    points = random_points(count, seed=count)

    kept = curve_of(points)

    assert len(kept) <= LONGEST
    assert [point for point in kept if point not in set(points)] == []
    assert kept == sorted(kept)
    if count:
        values = [value for _, value in points]
        assert {min(values), max(values)} <= {value for _, value in kept}
        assert kept[-1] == points[-1]
    if count <= MOST_BUCKETS:
        assert kept == points


def test_a_single_spike_and_a_single_gap_of_a_long_run_stay():
    points = [(step, 1.0) for step in range(50_000)]
    points[31_337], points[12_345], points[47_110] = (
        (31_337, 9.0),
        (12_345, -9.0),
        (47_110, math.nan),
    )

    kept = curve_of(points)

    assert {(31_337, 9.0), (12_345, -9.0)} <= set(kept)
    assert [step for step, value in kept if math.isnan(value)] == [47_110]
    assert final_values([RunHistory("a", {}, {"x": kept})]) == {"x": ["1 (-9 to 9)"]}
    lines = draw_chart("x", {"x": kept}).lines
    assert len(lines) == 2, "the gap is not drawn"
    assert sum(len(line.points) for line in lines) <= POINTS
    heights = [y for line in lines for _, y in line.points]
    flat = draw_chart("x", {"x": points}).axis
    whole = flat[1][1] - flat[0][1]
    assert max(heights) - min(heights) > 0.9 * whole, "a spike is not drawn"


def test_a_history_does_not_depend_on_how_often_it_was_read(tmp_path):
    run, points = RunDirectory(tmp_path), random_points(3000, seed=1)
    often = RunReader(run)
    with run.metrics.open("a") as file:
        for step, value in points:
            file.write(json.dumps({"step": step, "x": value}) + "\n")
            if step % 97 == 0:
                file.flush()
                often.read()

    assert often.read().curves == read_run(tmp_path).curves == {"x": curve_of(points)}


def test_drawing_reads_what_was_added_and_its_page_does_not_grow(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    reader, sizes, seconds = RunReader(run), list[int](), list[float]()
    read = list[int]()
    monkeypatch.setattr(
        "diptych.handlers.output.records.read_file",
        lambda path, start=0: (content := path.read_bytes()[start:], read.append(len(content)))[0],
    )
    for _ in range(12):
        with run.metrics.open("a") as file:
            points = random_points(2000, seed=2)
            file.writelines(json.dumps({"step": s, "a": v, "b": v}) + "\n" for s, v in points)
        start = time.process_time()
        sizes.append(len(page([reader.read()])))
        seconds.append(time.process_time() - start)

    assert max(read) < 1.01 * min(read)
    assert max(sizes[2:]) < 1.2 * min(sizes[2:])
    assert min(seconds[-3:]) < 3 * min(seconds[:3])


def test_a_file_that_was_replaced_by_a_shorter_one_is_read_anew(tmp_path):
    run = RunDirectory(tmp_path)
    reader = RunReader(run)
    run.metrics.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n')
    reader.read()

    run.metrics.write_text('{"step": 1, "a": 5}\n')

    assert reader.read().curves == {"a": [(1, 5.0)]}
    run.metrics.unlink()
    assert reader.read().curves == {}


def test_a_line_that_is_damaged_while_the_run_goes_on_costs_the_report_alone(tmp_path, caplog):
    trainer = make_trainer(log_every=1)
    trainer.attach(JsonLines(tmp_path), HistoryPlots(tmp_path, every=1))

    @trainer.on(Events.ITERATION_STARTED(once=4))
    def _() -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(path.read_bytes().replace(b'{"step": 2', b'{"stop": 2'))

    trainer.run(loader(), max_epochs=2)

    assert trainer.state.iteration == 12
    (error,) = [r.message for r in caplog.records if r.message.startswith("HistoryPlots could not")]
    assert f"{tmp_path / 'metrics.jsonl'}, line 2, must be a record" in error


@pytest.mark.parametrize("name", ["metrics.jsonl", "settings.json", "identity.json"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name):
    run = reported_run(tmp_path / "a")
    (run / name).unlink()
    (run / "metrics.digest.json").unlink()
    (run / name).mkdir()

    with pytest.raises(OSError, match=rf"{name}"):
        read_run(run)
