"""The meeting of a job's ranks, with store keys that no earlier start of the job has used.

torchrun keeps its store when it restarts the ranks. torch reads there the addresses of the ended
processes, which refuse the connection, and its restart count differs between nodes. Here rank 0
makes a new prefix for the keys, and continues only once every other rank has confirmed it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from diptych.engine.distributed.hang_report import numbered
from diptych.engine.errors import LostRankError

_c10d: Any = dist
"""The process groups of torch, which declares not all of their public names."""
SCHEME = "diptych-env"
"""The scheme of `METHOD`. Ignite takes rank and size from the environment if it contains "env"."""
METHOD = f"{SCHEME}://"
"""The `init_method` with which ranks meet under keys of their own."""
POLL = 0.02
"""Seconds between two looks of rank 0 for the others."""


def register_meeting() -> None:
    """Make `METHOD` known to torch."""
    try:
        _c10d.register_rendezvous_handler(SCHEME, _rendezvous)
    except RuntimeError:  # it is known
        return


def _rendezvous(_: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Any, int, int]]:
    for store, rank, ranks in _c10d.rendezvous("env://", timeout=timeout, **options):
        prefix = meet(store, rank, ranks, timeout)
        yield _c10d.PrefixStore(prefix, store), rank, ranks


def meet(store: Any, rank: int, ranks: int, timeout: timedelta) -> str:
    """Wait until all ranks have come, and return a prefix that they share and nothing else has.

    The store may hold the keys of ranks that have ended.

    Raises:
        LostRankError: if not all ranks come in time.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        absent = _invite(store, own, ranks, time.monotonic() + timeout.total_seconds())
        missing = f"{numbered(absent)} did not come" if absent else ""
    else:
        store.set(_asks(rank), own)
        try:
            store.wait([_invited(own)], timeout)
        except dist.DistStoreError:
            missing = "rank 0 did not come, or did not get all the others together"
        else:
            own, missing = store.get(_invited(own)).decode(), ""
            store.set(_accepts(own, rank), "")
    if missing:
        raise LostRankError(missing)
    return f"diptych/{own}"


def _invite(store: Any, own: str, ranks: int, end: float) -> list[int]:
    """Invite whoever asks until all ranks have accepted; return those that have not in time.

    A rank that has ended may have left its question in the store, and never accepts.
    """
    absent, invited = [*range(1, ranks)], set[str]()
    while absent:
        for index in absent:
            if store.check([_asks(index)]):
                other = store.get(_asks(index)).decode()
                if other not in invited:
                    store.set(_invited(other), own)
                    invited.add(other)
        absent = [index for index in absent if not store.check([_accepts(own, index)])]
        if time.monotonic() > end:
            break
        time.sleep(POLL if absent else 0)
    return absent


def _asks(rank: int) -> str:
    return f"diptych/asks/{rank}"


def _invited(process: str) -> str:
    return f"diptych/invited/{process}"


def _accepts(prefix: str, rank: int) -> str:
    return f"diptych/accepts/{prefix}/{rank}"
