"""Writes one thing at a time in a thread, and says what failed."""

from __future__ import annotations

import itertools
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
        except BaseException:  # the caller has it: nobody is to wait for the outcome
            self._job = None
            raise

    def wait(self) -> None:
        """Wait for the job that runs, without raising its error."""
        if self._job is not None:
            self._job.exception()

    @property
    def idle(self) -> bool:
        """Whether no job runs and none has an outcome that nobody has asked for."""
        return self._job is None

    def failure(self) -> CheckpointError | None:
        """Return the error of the last job, once, where it has ended with one."""
        if self._job is None or not self._job.done():
            return None
        error, self._job = self._job.exception(), None
        if error is not None and not isinstance(error, CheckpointError):
            raise error
        return error


def snapshot(state: Any, previous: Any = None) -> Any:
    """Return a copy of nested containers whose tensors are copies on the host.

    Args:
        state: mappings, lists and tuples of tensors and plain values.
        previous: an earlier snapshot that nobody needs any more; its tensors are filled anew where
            they fit, since fresh memory costs more than the copy.
    """
    if isinstance(state, torch.Tensor):
        fits = isinstance(previous, torch.Tensor) and _alike(state, previous)
        return previous.copy_(state.detach()) if fits else state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        before = previous if isinstance(previous, dict) else {}
        return {key: snapshot(value, before.get(key)) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        earlier = previous if isinstance(previous, type(state)) else ()
        pairs = itertools.zip_longest(state, earlier[: len(state)])
        return type(state)(snapshot(value, before) for value, before in pairs)
    return state


def _alike(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype == other.dtype
