"""Continuation of events and steps that an exception has left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from ignite.metrics import Metric

from diptych.engine.distributed.collectives import world_size
from diptych.engine.errors import ResumeError
from diptych.engine.events import StepEvents
from diptych.engine.loop.dispatcher import Dispatcher, selects_iterations
from diptych.engine.loop.left_event import named, returned

STEP = "step"
"""The name under which a step that has raised is noted."""

FETCH = "fetch"
"""The name under which a loader that has raised is noted."""


class ContinuedEvents(Dispatcher):
    """A `Dispatcher` whose events are continued after an exception, with the handler that raised.

    A handler that had returned must not act twice: it would publish, count or schedule twice.

    Attributes:
        attempts: how often a step was called, those that raised included. A handler with memory of
            an event inside the step can tell by it whether an iteration is repeated.
    """

    def __init__(self, process_function: Callable[[Engine, Any], Any]) -> None:
        super().__init__(process_function)
        self.attempts = 0
        # Whether a subclass fires events in its own way, as Ignite allows.
        self._is_overridden = any(
            getattr(type(self), name) is not getattr(Dispatcher, name)
            for name in ("fire_event", "_fire_event")
        )
        self._forget_failure()

    def _forget_failure(self) -> None:
        """Forget where an exception has stopped the run, which continues elsewhere."""
        # The names of the events that an exception has left, each with those of its handlers that
        # had returned; and the step, or the loader, that has raised.
        self._stopped_at: dict[str, tuple[str, ...]] = {}
        self._left: str | None = None  # the one at an epoch's end, if it or its log was left
        self._stop_flags: tuple[Any, Any] = (False, False)
        self._failed = False
        self._refusal: str | None = None

    def _note_failure(self, *, begun: bool) -> None:
        """Keep what the next run needs after an exception in this one.

        Over several ranks, a run that has `begun` must be resumed from a checkpoint.
        """
        self._stop_flags = (self.should_terminate, self.should_interrupt)
        self._failed = True
        if world_size() > 1 and begun:
            self._refuse(
                f"it failed in epoch {self.state.epoch} after iteration {self.state.iteration}, "
                f"and its {world_size()} ranks may have stopped at different places"
            )

    @property
    def failed_owners(self) -> list[Any]:
        """The objects whose functions the last exception has passed through."""
        return [listener.owner for listener in self._raised]

    def _continues_after_failure(self) -> bool:
        """Return whether an exception has stopped the run after `STARTED`; forget it.

        A stop that was asked for before the exception is asked for again.
        """
        self.should_terminate, self.should_interrupt = self._stop_flags
        failed, self._failed = self._failed, False
        self._stop_flags = (False, False)
        self._raised.clear()
        return failed and Events.STARTED.name not in self._stopped_at

    def _refuse(self, reason: str) -> None:
        """Let the next `run` raise, unless a state is loaded before."""
        self._refusal = (
            f"the run must be resumed from a checkpoint: {reason}. Start the script again, or load "
            "a checkpoint with the CheckpointManager first"
        )

    def _check_may_continue(self) -> None:
        if self._refusal is not None:
            raise ResumeError(self._refusal)

    def _fire(self, event: Any, *, again: bool = False) -> None:
        """Fire an event; if an exception has left it, call its remaining handlers only.

        With `again`, it fires a second time in this iteration; see `fire_again`.
        """
        if self._stopped_at or again or self._is_overridden:
            self._fire_left(event, again=again)
        elif self._found.get(id(event)) == [] and not self._edited.since_read:
            self.last_event_name = event  # nothing listens
        else:
            try:
                self.fire_event(event)
            except BaseException:
                self._stopped_at[event.name] = self._returned_of(event) or ()
                raise

    def _fire_started(self) -> None:
        """Fire `STARTED`; a continuing run resets no running mean and no patience of Ignite."""
        if self.state.iteration:
            at_start = self._listeners.get(Events.STARTED, ())
            resets = (id(one) for one in at_start if isinstance(one.owner, (Metric, EarlyStopping)))
            self._skipped = frozenset(resets)
        try:
            self._fire(Events.STARTED)
        finally:
            self._skipped = frozenset()

    def _fire_left(self, event: Any, *, again: bool) -> None:
        """Fire an event that an exception may have left, or in the way of a subclass."""
        done = self._stopped_at.pop(event.name, ())
        if done:
            self._skipped = named(self._listeners.get(event, ()), done)
        try:
            if again:
                self.fire_again(event)
            elif self._is_overridden and event.__class__ is Events:
                self._fire_event(event)
            else:
                self.fire_event(event)
        except BaseException:
            self._stopped_at[event.name] = self._returned_of(event, again=again) or done
            raise
        finally:
            if done:
                self._skipped = frozenset()

    def _returned_of(self, event: Any, *, again: bool = False) -> tuple[str, ...] | None:
        """Return the names of an event's handlers that came before the one that has raised."""
        listeners = self._listeners.get(event, [])
        if again:  # those that select iterations are not to be called by the continuation either
            chosen = [one for one in listeners if selects_iterations(one)]
            listeners = [*chosen, *(one for one in listeners if one not in chosen)]
        return returned(listeners, self._raised)

    def _fire_completed(self, event: Any) -> None:
        """Fire `EPOCH_COMPLETED`, `EPOCH_CUT`, what follows them, `TERMINATE` or `COMPLETED`."""
        self._fire(event)

    def _fire_published(self, event: Any, published: Any) -> None:
        """Fire the two events of an epoch's end; if one of them was left, continue with it."""
        left, self._left = self._left, None
        for one in (published,) if left == published.name else (event, published):
            self._raised.clear()
            try:
                self._fire_completed(one)
            except BaseException:
                self._left = one.name
                raise

    def _call_step(self, batch: Any) -> Any:
        """Call the step with a batch; after an exception behind its update, for what is left."""
        self.attempts += 1
        self._stopped_at.pop(STEP, None)
        last = StepEvents.OPTIMIZER_STEPPED
        done = self._stopped_at.pop(last.name, ()) if self._stopped_at else ()
        if done:
            self._skipped = named(self._listeners.get(last, ()), done)
        try:
            return self._process_function(self, batch)
        except BaseException:
            self._stopped_at[STEP] = ()
            if done:
                self._stopped_at[last.name] = done
            raise
        finally:
            if done:
                self._skipped = frozenset()
