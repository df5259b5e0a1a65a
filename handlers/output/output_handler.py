"""The base class of handlers that write a run's output: their errors never end a run."""

from __future__ import annotations

import functools
import logging
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from ignite.engine import Events

from diptych.engine.distributed.collectives import rank
from diptych.engine.errors import BatchError, CheckpointError, LostRankError, ResumeError
from diptych.engine.handler import Handler
from diptych.engine.loop.listener import Listener, filter_of

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)

Own = TypeVar("Own", bound="OutputHandler")

ERRORS_OF_THE_RUN = (BatchError, CheckpointError, LostRankError, ResumeError)
"""Errors that are not those of a destination: they reach the caller."""
MISTAKES_AT_THE_START = (FileExistsError, NotADirectoryError, TypeError, ValueError)
"""Errors that waiting does not mend: when a run starts, nothing is lost yet, and they are raised.

The first two mean that a part of the path is a file."""
SLOW, PAUSE = 0.02, 20.0
"""Seconds after which a failed attempt is slow, such as a time-out; and the pause after a slow one,
in durations of the attempt, so that retrying takes at most a twentieth of the time of a run."""


@attrs.define(eq=False)
class Outage:
    """What a destination has missed.

    Attributes:
        error: the last error, in words; "" if the last attempt succeeded.
        since: when the first attempt failed.
        retry: the time before which nothing is tried again, of `time.monotonic`.
        lost: what will not be written any more: records, events, lines.
    """

    error: str = ""
    since: float = 0.0
    retry: float = 0.0
    lost: int = 0


class OutputHandler(Handler):
    """The base class of handlers that write a run's output: sinks, reports, the progress bar.

    An error of such a handler never ends a run. It is logged once, with the name of what could not
    be written; the run continues, and a log line says when writing works again. `RunCard` prints
    what was not written when the run ends. Three kinds of errors reach the caller: those of the run
    itself (`BatchError`, `CheckpointError`, `LostRankError`, `ResumeError`), and at `STARTED` a
    `TypeError` or `ValueError`, and a path of which a part is a file.

    A subclass adds its functions to the trainer's events in `listen`. Each is guarded in this way,
    if it is a method of the handler.
    """

    __slots__ = ("_outages",)
    _outages: dict[str, Outage]

    def __new__(cls: type[Own], *_: object, **__: object) -> Own:
        """Make the handler; a subclass need not call an `__init__` of this class."""
        self = super().__new__(cls)
        self._outages = {}
        return self

    def attach(self, trainer: Trainer) -> None:
        """Listen to the trainer on rank 0, and guard every function that is added."""
        if rank() == 0:
            self.attach_guarded(trainer)

    def attach_guarded(self, trainer: Trainer) -> None:
        """Call `listen`, and guard every function that it adds."""
        known = set(map(id, trainer.listeners))
        self.listen(trainer)
        for listener in trainer.listeners:
            if id(listener) not in known and listener.owner is self:
                _replace(trainer, listener, self._guarded(listener))

    @abstractmethod
    def listen(self, trainer: Trainer) -> None:
        """Add the handler's functions to the trainer's events; called on rank 0 only."""

    @property
    def destination(self) -> str:
        """What the handler writes, in words, for the log: a path, or the name of a service."""
        return self.role or "its output"

    @property
    def unwritten(self) -> dict[str, int]:
        """The number of things that are not written, for each destination that lacks some."""
        return {name: outage.lost for name, outage in self._outages.items() if outage.lost}

    def last_error(self, destination: str) -> str:
        """Return the last error of a destination; "" if its last attempt succeeded."""
        outage = self._outages.get(destination)
        return "" if outage is None else outage.error

    @contextmanager
    def tolerated(
        self, destination: str | None = None, *, starting: bool = False, lost: int = 0
    ) -> Iterator[None]:
        """Log an error instead of raising it, once until the destination can be written again.

        Args:
            destination: for the log and the count; None: the handler's.
            starting: whether a mistake is raised, as at `STARTED`.
            lost: what is lost if an error occurs, for `unwritten`.
        """
        name, begin = destination or self.destination, time.monotonic()
        try:
            yield
        except Exception as error:
            if _reaches_the_caller(error, starting=starting):
                raise
            self._failed(name, error, time.monotonic() - begin, lost)
        else:
            if self._outages:
                self._succeeded(name)

    def may_retry(self, destination: str) -> bool:
        """Return whether an attempt is due: a slow one is not repeated at every record."""
        outage = self._outages.get(destination)
        return outage is None or time.monotonic() >= outage.retry

    def count_lost(self, destination: str, number: int = 1) -> None:
        """Count what will not be written any more."""
        self._outages.setdefault(destination, Outage()).lost += number

    def _failed(self, name: str, error: Exception, seconds: float, lost: int) -> None:
        outage = self._outages.setdefault(name, Outage())
        now, known = time.monotonic(), outage.error
        outage.lost += lost
        outage.retry = now + PAUSE * seconds if seconds > SLOW else now
        outage.error = _words(error)  # before logging, which may write to this handler
        if not known:
            outage.since = now
            logger.error(
                "%s could not write %s: %s. The run continues, and writing is tried again.",
                type(self).__name__,
                name,
                outage.error,
                exc_info=error if logger.isEnabledFor(logging.DEBUG) else None,
            )

    def _succeeded(self, name: str) -> None:
        outage = self._outages.get(name)
        if outage is not None and outage.error:
            outage.error, outage.retry = "", 0.0
            logger.warning(
                "%s writes %s again, after %.3g s.",
                type(self).__name__,
                name,
                time.monotonic() - outage.since,
            )

    def _part(self, listener: Listener) -> str:
        return f"{self.destination} (in {listener.name})"

    def _guarded(self, listener: Listener) -> Callable[..., object]:
        """Return the function of a listener with its errors logged."""
        function, added = listener.function, listener.added
        starting = listener.event == Events.STARTED
        # With a filter, a call that returns may have written nothing.
        tells_recovery = filter_of(listener.event) is None

        @functools.wraps(function)
        def guarded(*arguments: Any, **keywords: Any) -> None:
            # Not `tolerated`, which would take longer than most calls in an iteration.
            begin = time.monotonic()
            try:
                function(*arguments, **keywords)
            except Exception as error:
                if _reaches_the_caller(error, starting=starting):
                    raise
                self._failed(self._part(listener), error, time.monotonic() - begin, 0)
            else:
                if tells_recovery and self._outages:
                    self._succeeded(self._part(listener))

        # As Ignite's wrappers do, so that it is found by the function that was added, which
        # `__wrapped__` keeps alive.
        guarded._parent = weakref.ref(added)  # type: ignore[attr-defined]  # noqa: SLF001
        return guarded


def _replace(trainer: Trainer, listener: Listener, function: Callable[..., object]) -> None:
    """Replace the function of a listener, in Ignite's table too, from which profilers read it."""
    listener.function = function
    if listener.entry is None:  # a periodic one, which is not in the table
        return
    before, listener.entry = listener.entry, (function, *listener.entry[1:])
    entries = trainer._event_handlers[listener.event]  # noqa: SLF001
    for place, entry in enumerate(entries):
        if entry is before:
            entries[place] = listener.entry


def _reaches_the_caller(error: Exception, *, starting: bool) -> bool:
    return isinstance(error, ERRORS_OF_THE_RUN) or (
        starting and isinstance(error, MISTAKES_AT_THE_START)
    )


def _words(error: Exception) -> str:
    text = str(error).rstrip(".") or "no message"
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
