"""The limits of a run: epochs, iterations, the length of an epoch, and what waits for its end."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from ignite.engine import Events

from diptych.engine.data.loader_contract import check_is_loader, length_of
from diptych.engine.events import MetricsEvents
from diptych.engine.loop.listener import Listener

logger = logging.getLogger(__name__)


def epoch_length_of(data: Iterable[Any] | None, count: int | None) -> int | None:
    """Return the length of an epoch: a number of iterations, else that of `data` if it is known.

    Raises:
        ValueError: if there is neither data nor a number, or data has no batch.
    """
    if data is None and count is None:
        raise ValueError("epoch_length must be given if data is None, got neither")
    length = length_of(data) if count is None else count
    if length is not None and length < 1:
        raise ValueError(
            "data must have at least one batch, got an empty loader. Look at the data set's "
            "length; with drop_last=True it must be at least batch_size"
        )
    return length


def check_limits(data: Iterable[Any] | None, limits: Mapping[str, int | None]) -> None:
    """Check the arguments of `run`: its data, and its limits by name.

    Raises:
        TypeError: if `data` is not iterable, or a limit is not a whole number.
        ValueError: if a limit is below 1, or `max_epochs` and `max_iters` are both given.
    """
    if data is not None:
        check_is_loader("data", data)
    for name, value in limits.items():
        if value is not None:
            _check_limit(name, value)
    epochs, iterations = limits["max_epochs"], limits["max_iters"]
    if epochs is not None and iterations is not None:
        raise ValueError(
            f"max_epochs and max_iters are mutually exclusive, got {epochs} and {iterations}. "
            "Pass one of them"
        )


def _check_limit(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        is_short = isinstance(value, (str, float, bool))
        got = repr(value) if is_short else f"a {type(value).__name__}"
        raise TypeError(f"{name} must be a whole number, got {got}. Write run(data, {name}=10)")
    if int(value) < 1:
        raise ValueError(
            f"{name} must be >= 1, got {value}. To try a script without training, call "
            "trainer.dry_run(loader)"
        )


def report_waiting(listeners: Iterable[Listener], handlers: Sequence[str], max_iters: int) -> None:
    """Log what waits for an epoch's end that may never come.

    Args:
        listeners: all listeners; functions and foreign handlers at the end of an epoch are named.
        handlers: the keys of waiting handlers that declare `changes`, which know it themselves.
        max_iters: the iterations of the run.
    """
    ends = (Events.EPOCH_COMPLETED, MetricsEvents.EPOCH_PUBLISHED)
    waiting = [one for one in listeners if one.event in ends]
    foreign = [one.name for one in waiting if not hasattr(type(one.owner), "changes")]
    names = dict.fromkeys((*handlers, *foreign))
    if names:
        logger.warning(
            "The loader has no length, so with max_iters=%d no epoch may end. These handlers "
            "wait for one: %s.\nPass epoch_length= to run, or every=<iterations> to them.",
            max_iters,
            ", ".join(names),
        )
