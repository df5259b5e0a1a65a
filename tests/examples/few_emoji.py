"""The emoji example's script as it is, on each twelfth emoji.

Usage: few_emoji.py [parallel PORT] FLAGS; with `parallel` on two ranks that Ignite starts.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from ignite import distributed as idist

ROOT = Path(__file__).parents[2]
SAMPLES = 12


def run(_: int = 0) -> None:
    """Run the script, whose command line is this one's."""
    from examples.emoji import data

    read = data.read_emoji
    data.read_emoji = lambda: read()[::SAMPLES]
    runpy.run_path(str(ROOT / "examples" / "emoji" / "train.py"), run_name="__main__")


def main() -> None:
    """Run on as many ranks as whoever started this process says, or start two."""
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] != "parallel":
        run()
        return
    port = int(sys.argv[2])
    del sys.argv[1:3]
    with idist.Parallel(backend="gloo", nproc_per_node=2, master_port=port) as parallel:
        parallel.run(run)


if __name__ == "__main__":
    main()
