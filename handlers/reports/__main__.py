"""The command that lays runs side by side.

    python -m diptych.handlers.reports.__main__ compare runs/a runs/b --output comparison.html

Each argument is a run's folder. It prints the settings in which the runs differ and the last
values of all, and writes both, with the curves, as one page of HTML. It exits with 2 where a
folder is no run's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.handlers.reports.history_plots import (
    differing_settings,
    final_values,
    page,
    read_run,
    write_page,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    flags = _parse(arguments)
    try:
        runs = [read_run(directory) for directory in flags.runs]
    except FileNotFoundError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    names = [run.name for run in runs]
    sys.stdout.write(_lines("settings that differ", names, differing_settings(runs)))
    sys.stdout.write(_lines("last values", names, final_values(runs)))
    write_page(flags.output, page(runs))
    sys.stdout.write(f"written: {flags.output}\n")
    return 0


def _lines(title: str, names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> str:
    table = [[title, *names], *([name, *map(_in_a_line, values)] for name, values in rows.items())]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join([*lines, "", ""])


def _in_a_line(value: Any) -> str:
    return " ".join(str(value).split())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m diptych.handlers.reports.__main__", description="Lay runs side by side."
    )
    commands = parser.add_subparsers(required=True)
    compare = commands.add_parser("compare", help="two runs or more")
    compare.add_argument("runs", type=Path, nargs="+", help="the folders of runs")
    compare.add_argument(
        "--output", type=Path, default=Path("comparison.html"), help="the page to write"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
