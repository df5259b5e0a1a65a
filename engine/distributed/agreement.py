"""What the ranks of a run agree on, so that none waits for another for ever."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from diptych.engine.distributed.collectives import exchange_timeout, rank, world_size
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import CheckpointError

Result = TypeVar("Result")
PATIENCE = timedelta(seconds=2)
"""With ranks that may have gone, at the end of a run."""


@waits_at("agreeing on a checkpoint, which the first rank reads or writes")
def on_rank_zero(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and return its result on all ranks, which wait for it.

    Raises:
        CheckpointError: on all ranks, if it raised one.
    """
    if world_size() == 1:
        return action()
    told: list[Any] = [None, None]
    failure: CheckpointError | None = None
    if rank() == 0:
        try:
            told[0] = action()
        except CheckpointError as error:
            failure, told[1] = error, str(error)
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise CheckpointError(told[1])
    result: Result = told[0]
    return result


@waits_at("agreeing on a checkpoint")
def on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank and return its result, if it succeeds on all of them.

    Raises:
        CheckpointError: on all ranks, if it raised one on any: one's own, else the first rank's.
    """
    results: list[Result] = []
    failure: CheckpointError | None = None
    try:
        results.append(action())
    except CheckpointError as error:
        failure = error
    if world_size() > 1:
        told: list[str | None] = [None] * world_size()
        dist.all_gather_object(told, None if failure is None else str(failure))
        if failure is None:
            failing = [f"on rank {index}: {text}" for index, text in enumerate(told) if text]
            failure = CheckpointError(failing[0]) if failing else None
    if failure is not None:
        raise failure
    return results[0]


class LaggedMaximum:
    """The largest of every rank's numbers, told one call later, so that no rank waits for it.

    Each call starts a small all-reduce on the CPU and takes the result of the one before. Alone,
    the numbers come back at once.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    @waits_at("opening the group in which ranks agree when to stop")
    def open(self) -> None:
        """Make the group of the exchange; all ranks call it, before the first one."""
        if world_size() > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=exchange_timeout())

    def close(self) -> None:
        """Forget what was not asked for, once it has ended.

        An exchange that still goes on when the interpreter ends could end the process with SIGABRT.
        """
        if self._pending is not None:
            with contextlib.suppress(RuntimeError):  # the others may have gone
                self._pending[0].wait(PATIENCE)
        self._pending = None

    @waits_at("agreeing when to save and stop")
    def exchange(self, *numbers: int) -> tuple[int, ...]:
        """Return the maxima over ranks of the numbers of the call before; at first, zeros."""
        if world_size() == 1 or self._group is None:
            return numbers
        agreed = (0,) * len(numbers)
        if self._pending is not None:
            work, values = self._pending
            work.wait()
            agreed = tuple(int(value) for value in values)
        values = torch.tensor(numbers)
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, values)
        return agreed
