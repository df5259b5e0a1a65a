"""Where a rank waits for the others, and what it says when it has waited in vain.

A collective fails with a sentence of its backend's, which knows neither the part of the program nor
the reason. Every collective of a run happens in a part that has a name: a function with `waits_at`,
or a handler. That part gives the error its name, and asks the other ranks, through the store at
which they have met, what became of them. Each thread keeps a stack of the places that it is in, for
the monitor of backends whose collectives raise nothing.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, ParamSpec, Protocol, TypeVar

import torch.distributed as dist

from diptych.engine.errors import LostRankError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Named(Protocol):
    """An object that has a name for people, made when it is asked for."""

    @property
    def name(self) -> str:
        """The name."""
        ...


Place = tuple["Named | str", float]
"""The name of a part of the program, and when it was entered, by `perf_counter`."""

GRACE = 1.0
"""Seconds in which the others may say where they wait: they began at about the same time."""
MARKS = (
    "gloo/transport",
    "Application timeout caused pair closure",
    "Connection closed by peer",
    "Wait timeout",
)
"""What gloo says in plain runtime errors; other backends have exceptions of their own."""


class _Places(threading.local):
    """The places that the running thread has entered and not left, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Place] = []
        _stacks[threading.get_ident()] = self.stack


_stacks: dict[int, list[Place]] = {}
_places = _Places()


def enter_place(name: Named | str) -> None:
    """Push a place at which this thread may wait for other ranks. `leave_place` pops it.

    Cost: some 0.1 microseconds for both.

    Args:
        name: for people, as in "rank 0 waited at averaging gradients"; or an object whose `name`
            says it when it is needed.
    """
    _places.stack.append((name, perf_counter()))


def leave_place() -> Place:
    """Pop the place that was entered last, and return it."""
    return _places.stack.pop()


def current_place(thread: int) -> Place | None:
    """Return the innermost place of a thread, given by its identifier; None outside of any."""
    stack = _stacks.get(thread)
    try:
        return stack[-1] if stack else None
    except IndexError:  # the thread has left its last place meanwhile
        return None


def waits_at(place: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Name a function as a place where ranks may wait for one another.

    Args:
        place: for people, as in "rank 0 waited at averaging gradients".
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def waiting(*args: P.args, **kwargs: P.kwargs) -> T:
            stack = _places.stack
            since = perf_counter()
            stack.append((place, since))
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                name_wait(error, place, since)
                raise
            finally:
                stack.pop()

        return waiting

    return decorate


def name_wait(error: RuntimeError, place: str, since: float) -> None:
    """Raise what a rank says that waited in vain; return where the error is another one.

    Args:
        error: what was caught. One that has its name already, from a part further in, keeps it.
        place: the part of the program.
        since: when it was entered, by `perf_counter`.

    Raises:
        LostRankError: if the error is that of a collective.
    """
    if isinstance(error, LostRankError) or not _has_others() or not is_of_a_collective(error):
        return
    seconds = perf_counter() - since
    reason = _reason(place, closed="Connection" in str(error) or "pair closure" in str(error))
    raise LostRankError(
        f"rank {dist.get_rank()} waited {seconds:.1f} s for the other ranks, at: {place}. {reason}"
    ) from error


def is_of_a_collective(error: BaseException) -> bool:
    """Say whether an error is what a collective, or the meeting of the ranks, fails with."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in MARKS)


@contextmanager
def failure_told() -> Iterator[None]:
    """Tell the other ranks, before this one leaves, what it fails with in this context."""
    try:
        yield
    except LostRankError:  # has been told: where this rank waited
        raise
    except BaseException as error:
        line = traceback.format_exception_only(error)[-1].strip()
        _tell(f"failed with {line} (its own traceback says where)")
        raise


def _reason(place: str, *, closed: bool) -> str:
    """Return what became of the other ranks, as far as they have told."""
    told = _told_by_others(f"waits at: {place}")
    failed = {index: text for index, text in told.items() if text.startswith("failed")}
    elsewhere = {index: text for index, text in told.items() if not text.endswith(f": {place}")}
    parts = [f"rank {index} {text}" for index, text in (failed or elsewhere).items()]
    silent = [index for index in _others() if index not in told]
    if silent and not failed:
        ended = "has ended" if closed else "hangs, is slower than the timeout"
        parts.append(
            f"{_numbered(silent)} did not come here: it {ended}, or took another way through the "
            "program"
        )
    return _listed(parts or ["all ranks have come here, and the connection between them failed"])


def _told_by_others(own: str) -> dict[int, str]:
    """Tell where this rank waits; return what the other ranks have told, by rank."""
    found: dict[int, str] = {}
    try:
        _tell(own)
        end = time.monotonic() + GRACE
        while True:
            _read(found)
            failed = any(text.startswith("failed") for text in found.values())
            if failed or len(found) == len(_others()) or time.monotonic() > end:
                return found
            time.sleep(0.05)
    except RuntimeError as error:  # the store went with the rank that kept it
        logger.debug("the ranks' store is gone: %s", error)
        return found


def _read(found: dict[int, str]) -> None:
    """Add what other ranks have told since."""
    store = _store()
    for index in _others():
        if index not in found and store.check([_key(index)]):
            found[index] = store.get(_key(index)).decode()


def _others() -> list[int]:
    return [index for index in range(dist.get_world_size()) if index != dist.get_rank()]


def _tell(text: str) -> None:
    if not _has_others():
        return
    try:
        _store().set(_key(dist.get_rank()), text)
    except RuntimeError as error:
        logger.debug("the ranks' store is gone: %s", error)


def _has_others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public name


def _key(index: int) -> str:
    return f"diptych/waiting/{index}"


def _numbered(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"each of ranks {', '.join(map(str, ranks))}"


def _listed(parts: list[str]) -> str:
    more = f"; and {len(parts) - 3} more" if len(parts) > 3 else ""
    text = "; ".join(parts[:3]) + more
    return text[0].upper() + text[1:]
