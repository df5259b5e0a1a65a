"""The five comparisons give what the page on them says, as far as their libraries are here."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.promise import comparison, resumable, tile
from benchmarks.promise.comparison import Comparison, Outcome, Side
from benchmarks.promise.resumable import Run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "why.md"
SCRIPTS = ("micro_batch", "world_size", "interruption", "tile", "observation")
PEERS = os.environ.get("DIPTYCH_PEERS")
"""An interpreter that has the other libraries."""

KEPT = {"equal", "the same bits", "never waits"}

Row = tuple[str, str]
"""What was run, and the verdict without its figures."""


def comparison_of(script: str) -> Comparison:
    return importlib.import_module(f"benchmarks.promise.{script}").COMPARISON


def row(cells: list[str]) -> Row:
    return cells[1], cells[-1].partition(", memory")[0]


def shown(script: str, name: str) -> list[Row]:
    """Return a library's rows in the table that stands below the script's command."""
    section = PAGE.read_text("utf-8").partition(f"benchmarks.promise.{script} ")[2]
    table = [line.strip("| ").split(" | ") for line in section.partition("\n## ")[0].splitlines()]
    return [row(cells) for cells in table if re.sub(r" \d[\w.]*", "", cells[0]) == name]


def rows_of(report: dict[str, Any]) -> list[Row]:
    outcomes = [Outcome(**fields) for fields in report["rows"]]
    return [row(["", outcome.case, outcome.verdict]) for outcome in outcomes]


def found(script: str, name: str, python: str) -> list[Row]:
    return rows_of(comparison.report_by(python, comparison_of(script).module, name))


OTHERS = [
    (script, name)
    for script in SCRIPTS
    for name in comparison_of(script).sides
    if name not in {"Diptych", "torch"}
]


@pytest.mark.parametrize("script", ["micro_batch", "observation"])
def test_diptych_keeps_the_promise_in_this_process(script: str) -> None:
    rows = rows_of(comparison.report(comparison_of(script).sides["Diptych"]))

    assert rows == shown(script, "Diptych")
    assert {verdict for _, verdict in rows} <= KEPT


@pytest.mark.slow
@pytest.mark.parametrize("script", ["world_size", "interruption", "tile"])
def test_diptych_keeps_the_promise_in_processes_of_its_own(script: str) -> None:
    rows = found(script, "Diptych", sys.executable)

    assert rows == shown(script, "Diptych")
    assert {verdict for _, verdict in rows} <= KEPT


def test_the_run_that_is_killed_tells_each_of_its_updates(tmp_path: Path) -> None:
    updates: list[int] = []

    resumable.diptych(Run(tmp_path, augmented=True, tick=updates.append))

    assert updates == list(range(1, 25))


@pytest.mark.parametrize("way", [tile.WHOLE, tile.TILES])
def test_a_gradient_in_tiles_is_that_of_float64(way: str) -> None:
    assert tile.measured(way, 300)[1] <= comparison.EQUAL


@pytest.mark.slow
@pytest.mark.parametrize("script", ["world_size", "tile"])
def test_plain_torch_comes_out_as_the_page_says(script: str) -> None:
    assert found(script, "torch", sys.executable) == shown(script, "torch")


@pytest.mark.slow
@pytest.mark.skipif(not PEERS, reason="DIPTYCH_PEERS names no interpreter with the libraries")
@pytest.mark.parametrize(("script", "name"), OTHERS)
def test_a_peer_comes_out_as_the_page_says(script: str, name: str) -> None:
    assert found(script, name, str(PEERS)) == shown(script, name)


def test_the_page_shows_every_library_of_every_comparison() -> None:
    missing = [
        (script, name)
        for script in SCRIPTS
        for name in comparison_of(script).sides
        if not shown(script, name)
    ]

    assert missing == []


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [(0.0, "the same bits"), (1e-7, "equal"), (1e-4, "**differs**"), (math.nan, "**differs**")],
)
def test_a_verdict_follows_from_the_difference(difference: float, verdict: str) -> None:
    assert Outcome("", "", "", difference).verdict == verdict


def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it() -> None:
    report = comparison.report(Side(list, ("torch", "no-such-library")))

    (line,) = comparison.lines("Other", report)

    assert "not installed: pip install no-such-library" in line


def test_a_side_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'nobody'"):
        comparison.report_by(sys.executable, "benchmarks.promise.tile", "nobody")
