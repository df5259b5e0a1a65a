"""Names for the parts of a program that use collectives, and the error if a collective fails.

A failed collective raises an error of its backend, which names neither the part of the program nor
the cause. Every collective of a run happens at a named place: a function with `waits_at`, or a
handler. The error is raised again with the name of the place and with what became of the other
ranks, which publish that in the store through which they met. Each thread keeps a stack of the
places it is in, also for the monitor of backends whose collectives raise nothing.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, ParamSpec, Protocol, TypeVar

import torch.distributed as dist

from diptych.engine.errors import LostRankError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Named(Protocol):
    """An object with a name that is made on demand."""

    @property
    def name(self) -> str:
        """The name."""


Place = tuple["Named | str", float]
"""The name of a part of the program, and the time at which it was entered, by `perf_counter`."""

GRACE = 1.0
"""Seconds to wait for the reports of other ranks, whose timeouts expire at about the same time."""
MARKS = (
    "gloo/transport",
    "Application timeout caused pair closure",
    "Connection closed by peer",
    "Wait timeout",
)
"""Parts of gloo's messages in plain runtime errors; other backends raise classes of their own."""


class _Places(threading.local):
    """The places that the running thread has entered and not left, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Place] = []
        _stacks[threading.get_ident()] = self.stack


_stacks: dict[int, list[Place]] = {}
PLACES = _Places()
"""`PLACES.stack` is this thread's living stack, for code that enters many places."""


def entered_places() -> list[Place]:
    """Return the places that this thread is in, the innermost last."""
    return list(PLACES.stack)


def current_place(thread: int) -> Place | None:
    """Return the innermost place of a thread, given by its identifier; None outside of any."""
    stack = _stacks.get(thread)
    try:
        return stack[-1] if stack else None
    except IndexError:  # the thread has just left its last place
        return None


def waits_at(place: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Name a function as a place where ranks may wait for one another.

    The place is named as in "rank 0 waited at averaging gradients".
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def waiting(*args: P.args, **kwargs: P.kwargs) -> T:
            stack = PLACES.stack
            stack.append((place, perf_counter()))
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                raise_if_lost(error)
                raise
            finally:
                stack.pop()

        return waiting

    return decorate


def raise_if_lost(error: RuntimeError) -> None:
    """Raise `LostRankError` with the current place if a collective failed; otherwise return.

    Args:
        error: the error that was caught. A `LostRankError` from an inner place is left alone.

    Raises:
        LostRankError: if the error is that of a collective.
    """
    if isinstance(error, LostRankError) or not has_others() or not is_of_a_collective(error):
        return
    name, since = PLACES.stack[-1]
    place = name_of(name)
    seconds = perf_counter() - since
    reason = _reason(place, closed="Connection" in str(error))
    raise LostRankError(
        f"rank {dist.get_rank()} waited {seconds:.1f} s for the other ranks, at: {place}. {reason}"
    ) from error


def name_of(name: Named | str) -> str:
    """Return the name of a place as text."""
    return name if isinstance(name, str) else name.name


def is_of_a_collective(error: BaseException) -> bool:
    """Say whether an error comes from a collective, or from ranks that failed to meet."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in MARKS)


def has_others() -> bool:
    """Say whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def default_store() -> Any:
    """Return the store through which the ranks have met."""
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public name


def publish(text: str) -> None:
    """Publish what this rank does, for a rank that waits for it in vain.

    The text is as in "rank 0 failed with ValueError"; an empty one removes the last.
    """
    if not has_others():
        return
    try:
        default_store().set(_key(dist.get_rank()), text)
    except RuntimeError as error:
        logger.debug("The store of the process group is gone: %s", error)


@contextmanager
def failures_published() -> Iterator[None]:
    """Publish the error with which this rank leaves the context to the other ranks.

    What an earlier context has published is removed.
    """
    publish("")
    try:
        yield
    except LostRankError:  # this rank has published already where it waited
        raise
    except BaseException as error:
        line = traceback.format_exception_only(error)[-1].strip()
        publish(f"failed with {line} (its own traceback says where)")
        raise


def numbered(ranks: list[int]) -> str:
    """Return ranks as the subject of a sentence: "rank 1", "each of ranks 1, 2"."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"each of ranks {', '.join(map(str, ranks))}"


def _reason(place: str, *, closed: bool) -> str:
    """Return what became of the other ranks, as far as they have published it."""
    found = _published_by_others(f"waits at: {place}")
    failed = {index: text for index, text in found.items() if text.startswith("failed")}
    elsewhere = {index: text for index, text in found.items() if not text.endswith(f": {place}")}
    parts = [f"rank {index} {text}" for index, text in (failed or elsewhere).items()]
    silent = [index for index in _others() if index not in found]
    if silent and not failed:
        ended = "has ended" if closed else "hangs, is slower than the timeout"
        parts.append(
            f"{numbered(silent)} did not reach this collective: it {ended}, or ran another code "
            "path"
        )
    return _listed(
        parts or ["all ranks have reached this collective, and the connection between them failed"]
    )


def _published_by_others(own: str) -> dict[int, str]:
    """Publish where this rank waits; return what the other ranks have published, by rank."""
    found: dict[int, str] = {}
    try:
        publish(own)
        end, store = time.monotonic() + GRACE, default_store()
        while True:
            found |= _new_reports(store, known=found)
            failed = any(text.startswith("failed") for text in found.values())
            if failed or len(found) == len(_others()) or time.monotonic() > end:
                return found
            time.sleep(0.05)
    except RuntimeError as error:  # the rank that kept the store has ended
        logger.debug("The store of the process group is gone: %s", error)
        return found


def _new_reports(store: Any, known: Collection[int]) -> dict[int, str]:
    """Return what other ranks have published, without those that are known."""
    waiting = [i for i in _others() if i not in known and store.check([_key(i)])]
    texts = {index: store.get(_key(index)).decode() for index in waiting}
    return {index: text for index, text in texts.items() if text}


def _others() -> list[int]:
    return [index for index in range(dist.get_world_size()) if index != dist.get_rank()]


def _key(index: int) -> str:
    return f"diptych/waiting/{index}"


def _listed(parts: list[str]) -> str:
    more = f"; and {len(parts) - 3} more" if len(parts) > 3 else ""
    text = "; ".join(parts[:3]) + more
    return text[0].upper() + text[1:]
