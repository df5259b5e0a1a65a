"""One update on two ranks, each a process of its own, against the same update on one."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist

from diptych.engine.certificate.report import Check, shortened
from diptych.engine.certificate.update_copy import (
    BATCH_NORM,
    Gradients,
    Specimen,
    factor_of,
    in_evaluation_mode,
    names_of,
    relative_error,
)
from diptych.engine.data.batches import batch_size, join, part, to_device

RANKS = 2
TIMEOUT = timedelta(seconds=60)
TRANSFORM = (
    "the transform draws for a rank's batch, or mixes its samples: draw for each sample in the "
    "data set, and apply the draws in the transform"
)
Shares = dict[str, list[Any]]
Jobs = dict[str, tuple[Specimen, list[Any]]]


def check_ranks(specimen: Specimen, batch: Any, tolerance: float) -> list[Check]:
    """Compare two ranks with one, for equal and for unequal shares of the batch.

    The ranks run on the CPU, and so does what they are compared with.
    """
    here = specimen.on_cpu()
    batch = to_device(batch, here.device)
    try:
        found = run_on_two_ranks(jobs_of(here, batch))
    except RankError as error:
        return [Check("two ranks", None, passed=error.harmless, remark=str(error))]
    return compared(here, batch, found, tolerance)


def jobs_of(specimen: Specimen, batch: Any) -> Jobs:
    """Return what two ranks have to run: each kind of shares, in each form of the training."""
    return {
        f"{name}, {kind}": form
        for name, shares in _shares(batch).items()
        for kind, form in _forms(specimen, shares).items()
    }


def _forms(specimen: Specimen, shares: list[Any]) -> Jobs:
    """Return the training as it is, without batch norm, and with batches transformed before."""
    calm = specimen.changed(in_evaluation_mode(BATCH_NORM))
    forms = {"as it is": (specimen, shares), "calm": (calm, shares)}
    if specimen.transform is not None:
        ready, first = specimen.transformed(join(shares)), batch_size(shares[0])
        parts = [part(ready, 0, first), part(ready, first, batch_size(ready))]
        forms["transformed before"] = (attrs.evolve(calm, transform=None), parts)
    return forms


def compared(
    specimen: Specimen, batch: Any, found: dict[str, Gradients], tolerance: float
) -> list[Check]:
    """Return the checks that follow from what the jobs have found."""
    return [
        _check(name, _forms(specimen, shares), found, tolerance)
        for name, shares in _shares(batch).items()
    ]


def _shares(batch: Any) -> Shares:
    """Return the batches of both ranks by the name of the check."""
    size = batch_size(batch)
    half = size // 2
    return {
        f"two ranks, {half} + {half}": [part(batch, 0, half), part(batch, half, 2 * half)],
        f"two ranks, {half + 1} + {size - half - 1}": [
            part(batch, 0, half + 1),
            part(batch, half + 1, size),
        ],
    }


def _check(
    name: str,
    forms: Jobs,
    found: dict[str, Gradients],
    tolerance: float,
) -> Check:
    (specimen, shares), own = forms["as it is"], found[f"{name}, as it is"]
    expected = specimen.gradients(join(shares))
    error = relative_error(own, expected)
    if error <= tolerance:
        return Check(name, error, passed=True)

    def equal(kind: str) -> bool:
        if kind not in forms:
            return False
        other = forms[kind][0].gradients(join(forms[kind][1]))
        return relative_error(found[f"{name}, {kind}"], other) <= tolerance

    norms = names_of(specimen.model, BATCH_NORM)
    if norms and equal("calm"):
        culprit = f"batch norm sees one rank's samples: {shortened(norms)}"
    elif equal("transformed before"):
        culprit = TRANSFORM
    else:
        culprit = _culprit(specimen, shares, own, expected, tolerance)
    return Check(name, error, passed=False, remark=culprit)


def _culprit(
    specimen: Specimen, shares: list[Any], found: Gradients, expected: Gradients, tolerance: float
) -> str:
    factor = factor_of(found, expected) if found.keys() == expected.keys() else 0.0
    scaled = {name: value * factor for name, value in expected.items()}
    if factor and relative_error(found, scaled) <= tolerance:
        return f"the gradient is {factor:.3g} times too large: a factor of the number of ranks"
    apart = [specimen.gradients(share) for share in shares]
    mean = {name: (value + apart[1].get(name, 0)) / RANKS for name, value in apart[0].items()}
    if relative_error(found, mean) <= tolerance:
        return "the loss sees its own rank's samples alone: it must gather those of the others"
    return "the loss, or the model, does not say the same about the samples of all ranks"


class RankError(Exception):
    """Two ranks that did not run.

    Args:
        text: why.
        harmless: whether that says nothing about the training.
    """

    def __init__(self, text: str, *, harmless: bool) -> None:
        super().__init__(text)
        self.harmless = harmless


def run_on_two_ranks(jobs: Jobs) -> dict[str, Gradients]:
    """Return what the first rank finds for each job, a specimen and each rank's batch.

    Raises:
        RankError: if the jobs cannot be sent to another process, or a rank fails.
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
        told = [path.read_text() for path in sorted(Path(folder).glob("*.txt"))]
        if told:
            raise RankError(told[0].strip().splitlines()[-1], harmless=False)
        if any(process.exitcode for process in ranks):
            raise RankError(
                "the processes cannot import the script that runs here: put what it runs under "
                'if __name__ == "__main__", or use diptych certify',
                harmless=True,
            )
        found: dict[str, Gradients] = torch.load(Path(folder) / "found.pt", weights_only=True)
        return found


def _start(ranks: Sequence[Any]) -> None:
    try:
        for process in ranks:
            process.start()
    except Exception as error:  # whatever an object says that cannot be sent
        for process in ranks:
            if process.pid is not None:
                process.terminate()
        raise RankError(
            f"cannot be sent to other processes ({error}): define model, loss, task and transform "
            "at the top of a module, or run diptych certify module:function",
            harmless=True,
        ) from error


def _work(rank: int, folder: str, jobs: Jobs) -> None:
    """Be one of the ranks."""
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
