"""Observation: do validation and logging change the weights, or make the host wait?

    python -m benchmarks.promise.observation --peers /path/to/peers/bin/python

One epoch of 50 updates with dropout and shuffled samples from torch's loader. First without
validation, and with a validation at every 10th update over held-out samples in order. The table
shows the final loss over all samples, and the difference of the weights relative to the distance
that they travelled. Then without handlers, and with the usual progress bar and TensorBoard, which
log at every 50th update. The table shows how often per update the host reads a tensor's value
between two log points; each read would wait for a GPU.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.promise import watchable
from benchmarks.promise.comparison import Comparison, Outcome, Side, main, outcome
from benchmarks.promise.setting import loss_with, weights
from benchmarks.promise.watchable import Run

VALIDATED = "50 updates, validation at every 10th"
GENERATORS = "the same, with one generator per loader"
READ = "reads per update, progress bar and TensorBoard"

Train = Callable[[Run], None]
"""Trains, and validates or logs if the run asks for it."""


def validated(train: Train, folder: str, *, generators: bool = False) -> Outcome:
    """Return the row of two runs, without and with validation."""
    ends = []
    for validation in (False, True):
        run = Run(Path(folder), validation=validation, generators=generators)
        start = weights(run.model, run.loss)
        train(run)
        end = weights(run.model, run.loss)
        ends.append((loss_with(end, run.model, run.loss, run.data), end))
    return outcome(GENERATORS if generators else VALIDATED, *ends, start=start)


def read(train: Train, folder: str) -> Outcome:
    """Return the row of the host's reads per update, without handlers and with the usual ones."""
    reads = []
    for logs in (False, True):
        run = Run(Path(folder), logs=logs)
        with run.reads:
            train(run)
        reads.append(run.reads_an_update)
    verdict = "**waits**" if reads[1] else "never waits"
    return Outcome(READ, f"{reads[0]:.1f}", f"{reads[1]:.1f}", math.inf, verdict)


def outcomes(train: Train, *, has_loaders: bool = True) -> Iterator[Outcome]:
    """Run a library's training in all ways; `has_loaders`: whether the user creates the loaders."""
    with tempfile.TemporaryDirectory() as folder:
        yield validated(train, folder)
        if has_loaders:
            yield validated(train, folder, generators=True)
        yield read(train, folder)


COMPARISON = Comparison(
    "benchmarks.promise.observation",
    ("without", "with"),
    {
        "Lightning": Side(lambda: outcomes(watchable.lightning), ("lightning", "tensorboard")),
        "transformers": Side(
            lambda: outcomes(watchable.transformers, has_loaders=False),
            ("transformers", "accelerate", "tensorboard"),
        ),
        "Ignite": Side(
            lambda: outcomes(watchable.ignite), ("pytorch-ignite", "tensorboard", "tqdm")
        ),
        "Diptych": Side(lambda: outcomes(watchable.diptych), ("diptych",)),
    },
)

if __name__ == "__main__":
    main(__doc__, COMPARISON)
