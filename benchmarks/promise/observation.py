"""Watching a run: does it change what is learned, and does it make the device wait?

    python -m benchmarks.promise.observation --peers /path/to/peers/bin/python

One epoch of 50 updates with dropout and shuffled samples, both from torch's loaders. First without
validation, and with one at each 10th update over held-out samples in order: shown is the loss of
all samples at the end, and the difference of the weights, relative to the way that they went. Then
bare, and with the usual progress bar and TensorBoard, which log at each 50th update: shown is how
often the host reads a value of a tensor in an update between two log points, each of which would
wait for a GPU.
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
READ = "reads an update, progress bar and TensorBoard"

Train = Callable[[Run], None]


def outcomes(train: Train) -> Iterator[Outcome]:
    """Run a library's training bare, validated and logged."""
    with tempfile.TemporaryDirectory() as folder:
        bare, validated, logged = (
            Run(Path(folder) / "bare"),
            Run(Path(folder) / "validated", validation=True),
            Run(Path(folder) / "logged", logs=True),
        )
        start = weights(bare.model, bare.loss)
        ends = []
        for run in (bare, validated, logged):
            with run.reads:
                train(run)
            end = weights(run.model, run.loss)
            ends.append((loss_with(end, run.model, run.loss, run.data), end))
    yield outcome(VALIDATED, ends[0], ends[1], start)
    reads = bare.reads_an_update, logged.reads_an_update
    verdict = "**waits**" if reads[1] else "never waits"
    yield Outcome(READ, f"{reads[0]:.1f}", f"{reads[1]:.1f}", math.inf, verdict)


COMPARISON = Comparison(
    "benchmarks.promise.observation",
    ("unwatched", "watched"),
    {
        "Lightning": Side(lambda: outcomes(watchable.lightning), ("lightning", "tensorboard")),
        "transformers": Side(
            lambda: outcomes(watchable.transformers),
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
