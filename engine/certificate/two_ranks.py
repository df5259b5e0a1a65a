"""The check of one update on two ranks, in processes of their own, against the same on one."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diptych.engine.certificate.report import Check
from diptych.engine.certificate.training_copy import (
    BATCH_NORM,
    Gradients,
    TrainingCopy,
    factor_of,
    in_evaluation_mode,
    names_in_training,
    relative_error,
)
from diptych.engine.data.batches import batch_size, batch_slice, join_batches, to_device
from diptych.engine.name_patterns import listed

RANKS = 2
TIMEOUT = timedelta(seconds=60)
TRANSFORM = (
    "the transform draws once for a rank's batch, or mixes its samples: draw for each sample in "
    "the data set, and apply the draws in the transform"
)
Shares = list[Any]
"""The batch of each rank."""
Jobs = dict[str, tuple[TrainingCopy, Shares]]
"""The updates that two ranks make, by name."""
AS_IS, NO_NORMS, TRANSFORMED = "as it is", "without batch norm", "transformed before"
"""The forms in which a training runs, to find the cause of a difference."""


def check_ranks(training: TrainingCopy, batch: Any, tolerance: float) -> list[Check]:
    """Compare two ranks with one, for equal and for unequal shares of the batch, on the CPU."""
    training = training.on_cpu()
    batch = to_device(batch, training.device)
    try:
        found = run_on_two_ranks(jobs_of(training, batch))
    except RankError as error:
        return [Check("two ranks", None, passed=error.harmless, remark=str(error))]
    return compared(training, batch, found, tolerance)


def jobs_of(training: TrainingCopy, batch: Any) -> Jobs:
    """Return the jobs of two ranks: all forms of the training, with equal and unequal shares."""
    return {
        f"{name}, {form}": job
        for name, shares in _shares(batch).items()
        for form, job in _forms(training, shares).items()
    }


def _forms(training: TrainingCopy, shares: Shares) -> Jobs:
    """Return the training as it is, without batch norm, and with batches transformed before."""
    without_norms = training.changed(in_evaluation_mode(BATCH_NORM))
    forms = {AS_IS: (training, shares), NO_NORMS: (without_norms, shares)}
    if training.arguments["transform"] is not None:
        batch, first = training.transformed(join_batches(shares)), batch_size(shares[0])
        parts = [batch_slice(batch, 0, first), batch_slice(batch, first, batch_size(batch))]
        forms[TRANSFORMED] = (without_norms.with_arguments(transform=None), parts)
    return forms


def compared(
    training: TrainingCopy, batch: Any, found: dict[str, Gradients], tolerance: float
) -> list[Check]:
    """Return the checks that follow from the gradients of the jobs."""
    return [
        _check(name, _forms(training, shares), found, tolerance)
        for name, shares in _shares(batch).items()
    ]


def _shares(batch: Any) -> dict[str, Shares]:
    """Return the batches of both ranks by the name of the check."""
    size = batch_size(batch)
    half = size // 2
    bounds = {
        f"{half} + {half}": (half, 2 * half),
        f"{half + 1} + {size - half - 1}": (half + 1, size),
    }
    return {
        f"two ranks, {name}": [batch_slice(batch, 0, first), batch_slice(batch, first, stop)]
        for name, (first, stop) in bounds.items()
    }


def _check(name: str, forms: Jobs, found: dict[str, Gradients], tolerance: float) -> Check:
    def error(form: str) -> float:
        training, shares = forms[form]
        return relative_error(found[f"{name}, {form}"], training.gradients(join_batches(shares)))

    training, shares = forms[AS_IS]
    difference = error(AS_IS)
    if difference <= tolerance:
        return Check(name, difference, passed=True)
    norms = names_in_training(training.model, BATCH_NORM)
    if norms and error(NO_NORMS) <= tolerance:
        cause = f"batch norm sees one rank's samples: {listed(norms, 3)}"
    elif TRANSFORMED in forms and error(TRANSFORMED) <= tolerance:
        cause = TRANSFORM
    else:
        cause = _cause(training, shares, found[f"{name}, {AS_IS}"], tolerance)
    return Check(name, difference, passed=False, remark=cause)


def _cause(training: TrainingCopy, shares: Shares, found: Gradients, tolerance: float) -> str:
    expected = training.gradients(join_batches(shares))
    factor = factor_of(found, expected) if found.keys() == expected.keys() else 0.0
    scaled = {name: value * factor for name, value in expected.items()}
    if factor and relative_error(found, scaled) <= tolerance:
        return f"the gradient is {factor:.3g} times too large: a factor of the number of ranks"
    first, second = (training.gradients(share) for share in shares)
    mean = {name: (value + second.get(name, 0)) / RANKS for name, value in first.items()}
    if relative_error(found, mean) <= tolerance:
        return "the loss sees its own rank's samples alone: it must gather those of the others"
    return "the loss, or the model, computes something else from the samples of all ranks"


class RankError(Exception):
    """The update on two ranks did not run.

    Args:
        text: the cause.
        harmless: whether the cause is no fault of the training.
    """

    def __init__(self, text: str, *, harmless: bool) -> None:
        super().__init__(text)
        self.harmless = harmless


def run_on_two_ranks(jobs: Jobs) -> dict[str, Gradients]:
    """Return the gradients of each job on the first rank.

    Raises:
        RankError: if the jobs cannot be pickled for another process, or a rank fails.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_work, args=(rank, folder, jobs), daemon=True)
            for rank in range(RANKS)
        ]
        _start(ranks)
        for process in ranks:
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        if errors:
            raise RankError(errors[0].strip().splitlines()[-1], harmless=False)
        result = Path(folder) / "found.pt"
        # A script that ends when it is imported may do so without an error.
        if any(process.exitcode for process in ranks) or not result.is_file():
            raise RankError(
                "the processes cannot import the script that runs here: move its code under "
                'if __name__ == "__main__", or use diptych certify',
                harmless=True,
            )
        found: dict[str, Gradients] = torch.load(result, weights_only=True)
        return found


def _start(ranks: Sequence[Any]) -> None:
    try:
        for process in ranks:
            process.start()
    except Exception as error:  # objects that cannot be pickled raise errors of any class
        for process in ranks:
            if process.pid is not None:
                process.terminate()
        raise RankError(
            f"cannot be sent to other processes ({error}): define model, loss, task and transform "
            "at the top of a module, or run diptych certify module:function",
            harmless=True,
        ) from error


def _work(rank: int, folder: str, jobs: Jobs) -> None:
    """Run the jobs as one of the ranks; write the gradients, or the error, to the folder."""
    torch.set_num_threads(1)
    place = Path(folder)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{place / 'meeting'}",
            rank=rank,
            world_size=RANKS,
            timeout=TIMEOUT,
        )
        found = {name: one.gradients(shares[rank]) for name, (one, shares) in jobs.items()}
        if rank == 0:
            torch.save(found, place / "found.pt")
        dist.destroy_process_group()
    except BaseException:
        (place / f"{rank}.txt").write_text(traceback.format_exc())
        raise
