"""Where a rank waits for the others, and what it says when it has waited in vain.

A collective fails with a sentence of its backend's, which knows neither the part of the program nor
the reason. Every collective of a run happens in a part that has a name: a function with `waits_at`,
or a handler. That part gives the error its name, and asks the other ranks, through the store at
which they have met, what became of them. Nothing is recorded on the way there: the names stand on
the stack.
"""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from types import CodeType, FrameType
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

from diptych.engine.errors import LostRankError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Place = tuple[str, float]
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


def waits_at(place: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Name a function as a place where ranks may wait for one another.

    Cost: some 0.1 microseconds a call.

    Args:
        place: for people, as in "rank 0 waited at averaging gradients".
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def waiting(*args: P.args, **kwargs: P.kwargs) -> T:
            since = perf_counter()
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                name_wait(error, place, since)
                raise

        place_stands_in(waiting, _place_of_decorated)
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


_read_places: dict[CodeType, Callable[[Mapping[str, Any]], Place | None]] = {}


def place_stands_in(
    function: Callable[..., Any], read: Callable[[Mapping[str, Any]], Place | None]
) -> None:
    """Say how the local variables of a function that runs give the place that it stands for."""
    _read_places[function.__code__] = read


def _place_of_decorated(names: Mapping[str, Any]) -> Place | None:
    return (names["place"], names["since"]) if "since" in names else None


def current_place(frame: FrameType | None) -> Place | None:
    """Return the innermost place on a stack, from its innermost frame."""
    while frame is not None:
        read = _read_places.get(frame.f_code)
        place = read(frame.f_locals) if read is not None else None
        if place is not None:
            return place
        frame = frame.f_back
    return None
