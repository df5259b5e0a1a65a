"""The runner of a comparison: runs each library in a separate process, and prints the table."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
EQUAL = 1e-5
"""The relative difference up to which float32 results count as equal."""

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**20),  # glibc returns freed memory, so peaks are comparable
}


class Outcome(NamedTuple):
    """One row of a table: a case, run in two ways.

    Attributes:
        case: what was run.
        first: the result of the first way.
        second: the result of the second way.
        difference: relative difference of the weights; 0 means bit for bit; infinite if unknown.
        remark: the verdict, if it does not follow from the difference.
    """

    case: str
    first: str
    second: str
    difference: float
    remark: str = ""

    @property
    def gap(self) -> str:
        """The relative difference, as shown in the table."""
        return f"{self.difference:.1e}" if math.isfinite(self.difference) else ""

    @property
    def verdict(self) -> str:
        """Whether both ways had the same result, in words."""
        if self.remark:
            return self.remark
        if self.difference == 0:
            return "the same bits"
        return "equal" if self.difference <= EQUAL else "**differs**"


class Side(NamedTuple):
    """One library in a comparison.

    Attributes:
        run: returns the rows of the table.
        packages: the distributions that it needs; the first one is the library.
    """

    run: Callable[[], Iterable[Outcome]]
    packages: tuple[str, ...]


class Comparison(NamedTuple):
    """A comparison of libraries.

    Attributes:
        module: the name of the script's module.
        ways: the headers of the two columns of results.
        sides: the libraries by name.
    """

    module: str
    ways: tuple[str, str]
    sides: dict[str, Side]


def outcome(
    case: str, first: tuple[float, Tensor], second: tuple[float, Tensor], start: Tensor
) -> Outcome:
    """Return the row of two runs: their final losses, and the relative difference of the weights.

    Args:
        case: what was run.
        first: the loss and the weights after the first run.
        second: the loss and the weights after the second run.
        start: the weights before both runs. The difference is relative to the distance that the
            weights travelled in the first run.
    """
    difference = distance(second[1] - first[1]) / distance(first[1] - start)
    return Outcome(case, f"{first[0]:.6f}", f"{second[0]:.6f}", difference)


def distance(vector: Tensor) -> float:
    """Return the norm of a vector, computed in float64."""
    return float(vector.double().norm())


def is_missing(package: str) -> bool:
    """Return whether a distribution is missing in this interpreter."""
    try:
        version(package)
    except PackageNotFoundError:
        return True
    return False


def report(side: Side) -> dict[str, Any]:
    """Run one library in this process; return its rows and versions, or the missing packages."""
    if missing := [package for package in side.packages if is_missing(package)]:
        return {"missing": missing}
    torch.set_num_threads(1)
    rows = [row._asdict() for row in side.run()]
    return {
        "rows": rows,
        "version": version(side.packages[0]).partition("+")[0],
        "torch": torch.__version__,
    }


def report_by(python: str, module: str, name: str) -> dict[str, Any]:
    """Run one library in another process; return its report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        done = subprocess.run(
            [python, "-m", module, "--side", name, "--report", str(path)],
            cwd=ROOT,
            env={**os.environ, **SETTINGS},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{name} failed in {module}:\n{done.stderr[-3000:]}")
        return dict(json.loads(path.read_text()))


def lines(name: str, found: dict[str, Any]) -> list[str]:
    """Return the rows of one library as lines of a Markdown table."""
    if "missing" in found:
        install = f"not installed: pip install {' '.join(found['missing'])}"
        return [f"| {name} | {install} | | | | |"]
    rows = [Outcome(**row) for row in found["rows"]]
    library, _, rest = name.partition(",")
    name = f"{library} {found['version']}" + (f",{rest}" if rest else "")
    return [
        f"| {name} | {row.case} | {row.first} | {row.second} | {row.gap} | {row.verdict} |"
        for row in rows
    ]


def compare(comparison: Comparison, peers: str) -> None:
    """Run all libraries, and print each row as soon as it is known.

    Args:
        comparison: the comparison to run.
        peers: an interpreter that has the other libraries.
    """
    first, second = comparison.ways
    print(f"| library | what was run | {first} | {second} | relative difference | verdict |")
    print("|---|---|---|---|---:|---|")
    torches = set()
    for name in comparison.sides:
        python = sys.executable if name == "Diptych" else peers
        found = report_by(python, comparison.module, name)
        torches.add(found.get("torch", torch.__version__).partition("+")[0])
        print("\n".join(lines(name, found)), flush=True)
    print(f"\ntorch {', '.join(sorted(torches))}")


def options(description: str | None) -> argparse.Namespace:
    """Return the options of a script."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers", default=sys.executable, help="an interpreter that has the other libraries"
    )
    parser.add_argument("--side", help="run one library in this process")
    parser.add_argument("--report", type=Path, help="the file for the report of --side")
    return parser.parse_args()


def main(description: str | None, comparison: Comparison) -> None:
    """Print the table, or run one library for the process that prints it."""
    given = options(description)
    if given.side:
        given.report.write_text(json.dumps(report(comparison.sides[given.side])))
    else:
        compare(comparison, given.peers)
