"""Interruption: does a run that is killed and restarted end with the same weights?

    python -m benchmarks.promise.interruption --peers /path/to/peers/bin/python

Three epochs of 8 updates with dropout, shuffled samples, two workers, and a checkpoint at every 4th
update. The process kills itself with SIGKILL after update 14, or in the middle of its third save,
before the last file. Then it is restarted, and resumes as its library's documentation says. The
table shows the final loss over all samples, and the difference of the weights relative to the
distance that they travelled.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.promise import resumable
from benchmarks.promise.comparison import Comparison, Outcome, Side, main, outcome
from benchmarks.promise.resumable import EVERY, SAMPLES, Run
from benchmarks.promise.setting import loss_with, samples, weights

KILLED = "killed in an epoch"
AUGMENTED = "killed in an epoch, random augmentations"
SAVING = "killed in the middle of a save"
KILL_AFTER = 14

Train = Callable[[Run], None]
"""Trains, and resumes from the run's folder if it has a checkpoint."""


def child(train: Train, run: Run, end: Path, die_after: int, die_before: str) -> None:
    """Train in a child process, which may kill itself, and save the result to a file.

    Args:
        train: the training.
        run: the run.
        end: the file for the final weights, or for the name of an error.
        die_after: the update after which the process kills itself; 0: none.
        die_before: the last file of the third checkpoint, before which the process kills itself;
            "": none.
    """
    updates = 0

    def tick(update: int) -> None:
        nonlocal updates
        updates = update
        if update == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, details: tuple[object, ...]) -> None:
        writes = event == "os.rename" or (event == "open" and "w" in str(details[1]))
        third = updates >= 3 * EVERY - 1
        if writes and third and any(die_before in str(detail) for detail in details[:2]):
            os.kill(os.getpid(), signal.SIGKILL)

    if die_before:
        sys.addaudithook(audit)
    run.tick = tick
    try:
        train(run)
        torch.save(weights(run.model, run.loss), end)
    except Exception as error:  # noqa: BLE001 - another library may raise anything
        torch.save(f"{type(error).__name__}: {str(error).splitlines()[0]}", end)


def started(
    train: Train, run: Run, end: Path, die_after: int = 0, die_before: str = ""
) -> BaseProcess:
    """Start the training in a forked process."""
    process = multiprocessing.get_context("fork").Process(
        target=child, args=(train, run, end, die_after, die_before)
    )
    process.start()
    return process


def outcomes(train: Train, cases: dict[str, str]) -> Iterator[Outcome]:
    """Run a library's cases, each without a kill, and killed and restarted.

    Args:
        train: the library's training.
        cases: the names of the cases, with the file before which the process dies, if any.
    """
    for case, last_file in cases.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            alone, killed = (Run(folder / n, case == AUGMENTED) for n in ("alone", "killed"))
            ends = [folder / "alone.pt", folder / "killed.pt"]
            first = started(train, alone, ends[0])
            second = started(train, killed, ends[1], 0 if last_file else KILL_AFTER, last_file)
            first.join()
            second.join()
            if second.exitcode != -signal.SIGKILL:
                result = torch.load(ends[1], weights_only=True)
                raise RuntimeError(f"{case}: the process was not killed, and returned {result}")
            started(train, killed, ends[1]).join()
            yield compared(case, *(torch.load(end, weights_only=True) for end in ends))


def compared(case: str, alone: Tensor, killed: Tensor | str) -> Outcome:
    """Return the row of two runs, the second of which may have failed to restart."""
    run = Run(Path(), augmented=False)
    start = weights(run.model, run.loss)

    def value(vector: Tensor) -> float:
        return loss_with(vector, run.model, run.loss, samples(SAMPLES))

    if isinstance(killed, str):
        error = killed.partition(":")[0]
        return Outcome(case, f"{value(alone):.6f}", error, math.inf, "**does not start**")
    return outcome(case, (value(alone), alone), (value(killed), killed), start)


COMPARISON = Comparison(
    "benchmarks.promise.interruption",
    ("not killed", "killed, restarted"),
    {
        "Lightning": Side(
            lambda: outcomes(resumable.lightning, {KILLED: "", AUGMENTED: "", SAVING: "last.ckpt"}),
            ("lightning",),
        ),
        "Lightning, StatefulDataLoader": Side(
            lambda: outcomes(resumable.lightning_stateful, {KILLED: ""}),
            ("lightning", "torchdata"),
        ),
        "transformers": Side(
            lambda: outcomes(
                resumable.transformers, {KILLED: "", AUGMENTED: "", SAVING: "trainer_state.json"}
            ),
            ("transformers", "accelerate"),
        ),
        "Ignite": Side(lambda: outcomes(resumable.ignite, {KILLED: ""}), ("pytorch-ignite",)),
        "Ignite, DeterministicEngine": Side(
            lambda: outcomes(
                partial(resumable.ignite, deterministic=True), {KILLED: "", AUGMENTED: ""}
            ),
            ("pytorch-ignite",),
        ),
        "Diptych": Side(
            lambda: outcomes(
                resumable.diptych, {KILLED: "", AUGMENTED: "", SAVING: "manifest.json"}
            ),
            ("diptych",),
        ),
    },
)

if __name__ == "__main__":
    main(__doc__, COMPARISON)
