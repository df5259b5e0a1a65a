"""The ranks of a job that torchrun or Slurm has started."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from ignite import distributed as idist

from diptych.engine.distributed.hang_monitor import monitored
from diptych.engine.distributed.hang_report import failure_told, is_of_a_collective
from diptych.engine.errors import LostRankError

TIMEOUT = timedelta(minutes=10)
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
"""Variables that torchrun sets, all of them."""


@contextmanager
def process_group(*, backend: str | None = None, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Join the ranks of this job for as long as the context lasts.

    torchrun and Slurm say in the environment which rank a process is. Without them, and where a
    process group stands already (inside `idist.Parallel`), nothing is joined, so that one script
    serves all of them:

    ```python
    with process_group():
        main()
    ```

    A rank that fails leaves at once with its own traceback; the launcher ends the others. One that
    waits in vain says where it waited, for how long, and what became of the others. NCCL ends such
    a process from another thread: the place and the stack are logged before it does, and
    the stacks of all threads written when it does.

    Args:
        backend: nccl, gloo, ...; None: nccl where there is CUDA, else gloo.
        timeout: how long ranks wait for one another before an error, > 0.

    Raises:
        ValueError: if the timeout is not positive.
        LostRankError: if the ranks of the job do not meet, or this one waits for the others in
            vain within the context.
    """
    if timeout <= timedelta(0):
        raise ValueError(f"timeout must be positive, got {timeout}")
    if dist.is_available() and dist.is_initialized():
        with failure_told():
            yield
        return
    if not dist.is_available() or _ranks_of_the_job() == 1:
        yield
        return
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    with _stacks_written():
        _join(backend, timeout)
        watch = nullcontext() if backend == "gloo" else monitored(timeout)
        with failure_told(), watch:
            yield
    with _torchrun_before_slurm():
        idist.finalize()  # not after a failure: it would wait for ranks that wait for this one


def _ranks_of_the_job() -> int:
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in os.environ else 1


def _join(backend: str, timeout: timedelta) -> None:
    """Meet the other ranks.

    Raises:
        LostRankError: if not all come.
    """
    if backend == "nccl" and torch.__version__ < "2.9":  # later versions do so by themselves
        # Its watchdog then names the call that launched a collective which has timed out.
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    told = {name: os.environ[name] for name in _SAID if name in os.environ}  # Ignite adds to them
    ranks, since = _ranks_of_the_job(), time.monotonic()
    try:
        with _torchrun_before_slurm():
            idist.initialize(backend, timeout=timeout)
    except RuntimeError as error:
        if not is_of_a_collective(error):
            raise
        raise LostRankError(
            f"a rank waited {time.monotonic() - since:.1f} s for all {ranks} ranks "
            f"of the job to meet, and they did not come. The environment says "
            f"{', '.join(f'{name}={value}' for name, value in told.items())}: start every "
            "rank (srun, torchrun), or, for a run of one process, unset "
            f"{'WORLD_SIZE' if 'WORLD_SIZE' in told else 'SLURM_PROCID'}"
        ) from error


_SAID = (*TORCHRUN[:-1], "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NODELIST")


@contextmanager
def _torchrun_before_slurm() -> Iterator[None]:
    """Hide a Slurm job inside which torchrun has started this process.

    Ignite would take each node for one rank there.
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
    """Have the stacks of all threads written when a signal such as SIGABRT ends the process."""
    if faulthandler.is_enabled() or sys.__stderr__ is None:
        yield
        return
    faulthandler.enable(sys.__stderr__)
    yield
    faulthandler.disable()  # not after a failure: others may end the process still
