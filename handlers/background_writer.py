"""Writes one thing at a time in a thread, and says what failed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from diptych.engine.errors import CheckpointError


class BackgroundWriter:
    """Runs jobs one after another, in a thread or at once.

    Args:
        in_thread: whether a job runs while the caller goes on.
    """

    def __init__(self, *, in_thread: bool) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1) if in_thread else None
        self._job: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job, after the one before it."""
        self.wait()
        if self._pool is not None:
            self._job = self._pool.submit(job)
            return
        self._job = Future()
        try:
            job()
            self._job.set_result(None)
        except CheckpointError as error:
            self._job.set_exception(error)

    def wait(self) -> None:
        """Wait for the job that runs, without raising its error."""
        if self._job is not None:
            self._job.exception()

    def failure(self) -> CheckpointError | None:
        """Return the error of the last job, once, where it has ended with one."""
        if self._job is None or not self._job.done():
            return None
        error, self._job = self._job.exception(), None
        if error is not None and not isinstance(error, CheckpointError):
            raise error
        return error


def snapshot(state: Any) -> Any:
    """Return a copy of nested containers whose tensors are copies on the host."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(snapshot(value) for value in state)
    return state
