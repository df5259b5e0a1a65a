"""The ranks of a job that torchrun or Slurm has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from ignite import distributed as idist

TIMEOUT = timedelta(minutes=10)


@contextmanager
def process_group(*, backend: str | None = None, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Join the ranks of this job for as long as the context lasts.

    torchrun and Slurm say in the environment which rank a process is. Without them, and where a
    process group stands already (inside `idist.Parallel`), nothing happens, so that one script
    serves all of them:

    ```python
    with process_group():
        main()
    ```

    A rank that fails leaves at once with its own traceback; the launcher ends the others.

    Args:
        backend: nccl, gloo, ...; None: nccl where there is CUDA, else gloo.
        timeout: how long ranks wait for one another before an error, > 0.

    Raises:
        ValueError: if the timeout is not positive.
    """
    if timeout <= timedelta(0):
        raise ValueError(f"timeout must be positive, got {timeout}")
    if not dist.is_available() or dist.is_initialized() or _ranks_of_the_job() == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    idist.initialize(backend or ("nccl" if cuda else "gloo"), timeout=timeout)
    yield
    idist.finalize()  # not after a failure: it would wait for ranks that wait for this one


def _ranks_of_the_job() -> int:
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in os.environ else 1
