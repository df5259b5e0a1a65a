"""Watching a run: does it change what is learned, and does it make the device wait?

    python -m benchmarks.promise.observation --peers /path/to/peers/bin/python

One epoch of 50 updates with dropout and shuffled samples from torch's loader. First without
validation, and with one at each 10th update over held-out samples in order: shown is the loss of
all samples at the end, and the difference of the weights, relative to the way that they went. Then
bare, and with the usual progress bar and TensorBoard, which log at each 50th update: shown is how
often the host reads a tensor's value in an update between two log points, each of which would wait
for a GPU.
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

VALIDATED = "50 updates, validation at each 10th"
GENERATORS = "the same, each loader with a generator of its own"
READ = "reads an update, progress bar and TensorBoard"

Train = Callable[[Run], None]
"""Trains, and validates or logs as the run says."""


def validated(train: Train, folder: str, *, generators: bool = False) -> Outcome:
    """Return the row of a run without validation and one with it."""
    ends = []
    for validation in (False, True):
        run = Run(Path(folder), validation=validation, generators=generators)
        start = weights(run.model, run.loss)
        train(run)
        end = weights(run.model, run.loss)
        ends.append((loss_with(end, run.model, run.loss, run.data), end))
    return outcome(GENERATORS if generators else VALIDATED, *ends, start=start)


def read(train: Train, folder: str) -> Outcome:
    """Return the row of how often the host reads a value, bare and with the usual handlers."""
    reads = []
    for logs in (False, True):
        run = Run(Path(folder), logs=logs)
        with run.reads:
            train(run)
        reads.append(run.reads_an_update)
    verdict = "**waits**" if reads[1] else "never waits"
    return Outcome(READ, f"{reads[0]:.1f}", f"{reads[1]:.1f}", math.inf, verdict)


def outcomes(train: Train, *, has_loaders: bool = True) -> Iterator[Outcome]:
    """Run a library's training in all ways; `has_loaders`: whether the user makes its loaders."""
    with tempfile.TemporaryDirectory() as folder:
        yield validated(train, folder)
        if has_loaders:
            yield validated(train, folder, generators=True)
        yield read(train, folder)


COMPARISON = Comparison(
    "benchmarks.promise.observation",
    ("unwatched", "watched"),
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
