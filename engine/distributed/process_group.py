"""The process group of a job that torchrun or Slurm has started."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from ignite import distributed as idist

from diptych.engine.distributed.hang_monitor import hangs_logged
from diptych.engine.distributed.hang_report import failures_published, is_of_a_collective
from diptych.engine.distributed.meeting import METHOD, register_meeting
from diptych.engine.errors import LostRankError

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
"""The variables that torchrun sets, all of them."""
VARIABLES = (*TORCHRUN[:-1], "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NODELIST")
"""The variables that an error names."""
NUMBERS = {
    "WORLD_SIZE": 1,
    "RANK": 0,
    "LOCAL_RANK": 0,
    "MASTER_PORT": 1,
    "SLURM_NTASKS": 1,
    "SLURM_PROCID": 0,
    "SLURM_LOCALID": 0,
}
"""The variables that must be numbers, and the least value of each."""
UNCONNECTED = (
    "connectFullMesh",
    "Connect timeout",
    "Connection refused",
    "Connection reset",
    "Connection closed by peer",
)
"""Parts of the messages of backends whose ranks could not connect."""


@contextmanager
def process_group(*, backend: str | None = None, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Join the process group of this job for the length of the context.

    torchrun and Slurm set the rank of a process in its environment. Without these variables, or if
    there is a process group already (inside `idist.Parallel`), this context does nothing, so that
    one script works in all cases:

    ```python
    with process_group():
        main()
    ```

    A rank that fails leaves at once with its own traceback; the launcher ends the others. A rank
    that waits in vain raises an error with the place, the time, and what became of the others. NCCL
    ends such a process from another thread: the place and the stack are logged before that, and
    the stacks of all threads are written at that moment.

    Args:
        backend: nccl, gloo, ...; None: nccl if CUDA is available, else gloo.
        timeout: the time that ranks wait for one another before an error, > 0.

    Raises:
        ValueError: if the timeout is not positive.
        LostRankError: if the ranks of the job do not meet, or this rank waits for the others in
            vain within the context.
    """
    if timeout <= timedelta(0):
        raise ValueError(f"timeout must be positive, got {timeout}")
    if dist.is_available() and dist.is_initialized():
        with failures_published():
            yield
        return
    if not dist.is_available() or _ranks_of_the_job() == 1:
        yield
        return
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    with _stacks_written():
        _join(backend, timeout)
        watch = nullcontext() if backend == "gloo" else hangs_logged(timeout)
        with failures_published(), watch:
            yield
    with _torchrun_before_slurm():
        idist.finalize()  # not after a failure: ranks that wait for this one would not come


def _ranks_of_the_job() -> int:
    """Return the number of ranks that the launcher has set; 1 without a launcher."""
    for name, least in NUMBERS.items():
        value = os.environ.get(name)
        if value is not None and not (value.strip().isdecimal() and int(value) >= least):
            raise ValueError(
                f"{name} must be a whole number >= {least}, got {value!r}. The launcher (torchrun, "
                f"srun) sets it; for a run of one process, unset it"
            )
    if "WORLD_SIZE" in os.environ:
        ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ.get("RANK", "0"))
        if rank >= ranks > 1:  # the others would wait for a rank that never comes
            raise ValueError(
                f"RANK must be less than WORLD_SIZE, which is {ranks}, got {rank}. The launcher "
                "(torchrun, srun) sets both; each process has a number of its own"
            )
        return ranks
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in os.environ else 1


def _join(backend: str, timeout: timedelta) -> None:
    """Initialize the process group with the other ranks.

    If the ranks meet and cannot connect, they meet again as long as the timeout allows.
    """
    if backend == "nccl" and torch.__version__ < "2.9":  # later versions set it themselves
        # Its watchdog then names the call of a collective that has timed out.
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    since, seconds = time.monotonic(), 0.0
    register_meeting()
    error = _attempt(backend, timeout)
    while error is not None:
        seconds = time.monotonic() - since
        if not _could_connect_later(error) or seconds >= timeout.total_seconds():
            raise LostRankError(_unmet(error, seconds)) from error
        logger.warning("The ranks met and could not connect; they meet again. %s", error)
        error = _attempt(backend, timeout)


def _attempt(backend: str, timeout: timedelta) -> RuntimeError | None:
    """Initialize the process group; return the error if the other ranks are its cause."""
    environment = dict(os.environ)
    try:
        with _torchrun_before_slurm():
            idist.initialize(backend, timeout=timeout, init_method=METHOD)
    except RuntimeError as error:
        if not isinstance(error, LostRankError) and not is_of_a_collective(error):
            raise
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()  # Ignite has added variables
        os.environ.update(environment)
        return error
    return None


def _could_connect_later(error: RuntimeError) -> bool:
    """Say whether the ranks had met before this error, and may connect in another attempt."""
    return _had_met(error) and any(mark in str(error) for mark in UNCONNECTED)


def _had_met(error: RuntimeError) -> bool:
    return not isinstance(error, (LostRankError, dist.DistNetworkError, dist.DistStoreError))


def _unmet(error: RuntimeError, seconds: float) -> str:
    """Return the message of a rank whose process group could not be initialized."""
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    own = given.get("RANK", given.get("SLURM_PROCID"))
    cause = str(error).strip().splitlines()[0].rstrip(".")
    text = f"rank {own} waited {seconds:.1f} s for all {_ranks_of_the_job()} ranks of the job to"
    if _had_met(error):
        return (
            f"{text} connect. They had met, and the connection between them failed: {cause}. Look "
            "for the error of a rank that has ended, and check that the nodes reach each other."
        )
    return (
        f"{text} meet: {cause}. The environment holds "
        f"{', '.join(f'{name}={value}' for name, value in given.items())}. Start every "
        "rank (srun, torchrun), or, for a run of one process, unset "
        f"{'WORLD_SIZE' if 'WORLD_SIZE' in given else 'SLURM_PROCID'}."
    )


@contextmanager
def _torchrun_before_slurm() -> Iterator[None]:
    """Hide the Slurm job if torchrun has started this process inside one.

    Ignite would count each node as one rank.
    """
    inside = all(name in os.environ for name in TORCHRUN)
    job = os.environ.pop("SLURM_JOB_ID", None) if inside else None
    try:
        yield
    finally:
        if job is not None:
            os.environ["SLURM_JOB_ID"] = job


@contextmanager
def _stacks_written() -> Iterator[None]:
    """Write the stacks of all threads if a signal such as SIGABRT ends the process."""
    if faulthandler.is_enabled() or sys.__stderr__ is None:
        yield
        return
    faulthandler.enable(sys.__stderr__)
    yield
    faulthandler.disable()  # not after a failure: NCCL may still end the process
