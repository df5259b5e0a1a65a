"""Agreement between ranks: results and errors of one rank reach all, so that none hangs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from diptych.engine.distributed.collectives import exchange_timeout, rank, world_size
from diptych.engine.distributed.hang_report import (
    default_store,
    has_others,
    publish,
    waits_at,
)
from diptych.engine.errors import CheckpointError

Result = TypeVar("Result")
PATIENCE = timedelta(seconds=2)
"""The longest wait, at the end of a run, for ranks that may have ended."""


class _Meetings:
    """Counts the meetings at each place, in one process group."""

    def __init__(self) -> None:
        self._store: Any = None
        self._counts: Counter[str] = Counter()

    def next(self, place: str, store: Any) -> int:
        """Return the number of the next meeting at a place, from 1 for a new group's store."""
        if store is not self._store:
            self._store, self._counts = store, Counter()
        self._counts[place] += 1
        return self._counts[place]


_meetings = _Meetings()


def wait_for_all_ranks(place: str, about: str = "") -> None:
    """Wait until all ranks are at a place, before the first of its collectives.

    The ranks meet through the store of the process group. If only some of them come, all raise an
    error after the timeout. In a collective, they would instead be matched with ranks that are in
    another one, in which some backends end the process.

    Cost: three requests to the store; not for every iteration.

    Args:
        place: as in "rank 0 waited at an evaluation"; the same on all ranks.
        about: what other ranks should know about this one if they wait in vain.

    Raises:
        LostRankError: if the others do not come within the timeout.
    """
    if not has_others():
        return
    name = f"{place} ({about})" if about else place
    store = default_store()
    key = f"diptych/all at/{place}/{_meetings.next(place, store)}"
    publish(f"waits at: {name}")
    if store.add(key, 1) == world_size():
        store.set(f"{key}/met", "")
    waits_at(name)(store.wait)([f"{key}/met"], exchange_timeout())
    publish("")


@waits_at("agreeing on a checkpoint, which the first rank reads or writes")
def on_rank_zero(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and return its result on all ranks.

    Raises:
        CheckpointError: on all ranks, if `action` raised one.
    """
    if world_size() == 1:
        return action()
    wait_for_all_ranks("agreeing on a checkpoint")
    outcome: list[Any] = [None, None]
    failure: CheckpointError | None = None
    if rank() == 0:
        try:
            outcome[0] = action()
        except CheckpointError as error:
            failure, outcome[1] = error, str(error)
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    result: Result = outcome[0]
    return result


@waits_at("agreeing on a checkpoint")
def on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank and return its result if it succeeds on all of them.

    Raises:
        CheckpointError: on all ranks, if it raised one on any rank: this rank's own error, else
            that of the first rank that failed.
    """
    results: list[Result] = []
    failure: CheckpointError | None = None
    try:
        results.append(action())
    except CheckpointError as error:
        failure = error
    if world_size() > 1:
        wait_for_all_ranks("agreeing on a checkpoint")
        messages: list[str | None] = [None] * world_size()
        dist.all_gather_object(messages, None if failure is None else str(failure))
        if failure is None:
            failing = [f"on rank {index}: {text}" for index, text in enumerate(messages) if text]
            failure = CheckpointError(failing[0]) if failing else None
    if failure is not None:
        raise failure
    return results[0]


class LaggedMaximum:
    """The maximum of numbers over ranks, one call late, so that no rank waits for the others.

    Each call starts a small all-reduce on the CPU and returns the result of the one before. With
    one rank, it returns the numbers at once.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    @waits_at("opening the group in which ranks agree when to stop")
    def open(self) -> None:
        """Make the process group; all ranks call it before the first exchange."""
        if world_size() > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=exchange_timeout())

    def close(self) -> None:
        """Wait for the last exchange and drop its result.

        An exchange that is still running when the interpreter exits can abort the process.
        """
        if self._pending is not None:
            with contextlib.suppress(RuntimeError):  # other ranks may have ended
                self._pending[0].wait(PATIENCE)
        self._pending = None

    @waits_at("agreeing when to save and stop")
    def exchange(self, *numbers: int) -> tuple[int, ...]:
        """Return the maxima over ranks of the previous call's numbers; zeros in the first call."""
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
