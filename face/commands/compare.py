"""Compare runs by their directories.

Prints what decides the runs' results and differs between them, then the best value of each
evaluation's metrics, and writes both, the curves and the last values into one page of HTML.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.handlers.files import write_atomically
from diptych.handlers.reports.comparison import best_texts, differing_settings
from diptych.handlers.reports.page import page
from diptych.handlers.reports.run_history import read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("first", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument("others", type=Path, metavar="RUN", nargs="+", help="those of others")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison.html"),
        help="the page to write (%(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Print two tables, and write the page."""
    runs = [read_run(directory) for directory in (options.first, *options.others)]
    names = [run.name for run in runs]
    different = differing_settings(runs) or {"nothing that decides the results": [""] * len(runs)}
    sys.stdout.write(_table("what differs", names, different))
    sys.stdout.write(_table("best values", names, best_texts(runs)))
    try:
        write_atomically(options.output, page(runs))
    except OSError as error:
        raise OSError(
            error.errno,
            f"--output {options.output} cannot be written: {error.strerror}. Give another file.",
        ) from error
    sys.stdout.write(f"Wrote {options.output}.\n")
    return 0


def _table(title: str, names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> str:
    table = [
        [title, *names],
        *([_in_a_line(name), *map(_in_a_line, values)] for name, values in rows.items()),
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join([*lines, "", ""])


def _in_a_line(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if text.isprintable() else ascii(text)[1:-1]  # a terminal would obey the others
