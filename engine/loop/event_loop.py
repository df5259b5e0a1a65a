"""The run loop: an Ignite engine that can be stopped and resumed at any iteration."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ignite.engine import Engine, Events, State

from diptych._argument_names import names_the_right_argument
from diptych.engine.data.loader_contract import length_of
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import ResumeError
from diptych.engine.events import ITERATION_EVENTS, MetricsEvents, Outcome, RunEvents, StepEvents
from diptych.engine.handler import contract_of
from diptych.engine.loop.continued_events import FETCH, STEP
from diptych.engine.loop.limits import check_limits, epoch_length_of, report_waiting
from diptych.engine.loop.position import Phase, Position
from diptych.engine.loop.positioned_events import PositionedEvents

logger = logging.getLogger(__name__)

# Faster than attributes of the class, which each iteration reads.
BEFORE_STEP = Phase.BEFORE_STEP
ENDED = (Phase.EPOCH_ENDED, Phase.PASS_ENDED)


class EventLoop(PositionedEvents):
    """An Ignite `Engine` whose runs can be stopped and continued at any iteration.

    Differences from the base class:

    - `run` on a finished run logs a warning and does nothing. A larger `max_epochs` continues the
      run. As in Ignite, `state.max_epochs = None` before `run` starts over.
    - `terminate()` and `interrupt()` take effect at the end of the running iteration. The next
      `run` with the same loader continues with the next batch of the epoch.
    - An exception always reaches the caller. `EXCEPTION_RAISED` fires once before. The next `run`
      continues there, without `STARTED`: a handler that raised is called again, and those after
      it; handlers that had returned are not. A step that raised is repeated with the same batch,
      unless its update was made. Over several ranks, the next `run` raises.
    - Another loader inside an epoch, or a loader of another length, is an error.
    - `EPOCH_STARTED` fires once per epoch, also if the epoch is continued in a later `run`.
    - If `max_iters` ends a run inside an epoch, `RunEvents.EPOCH_CUT` fires before `COMPLETED`.
    - A finished run whose `COMPLETED` has not fired, or whose process was killed there, fires it
      alone in the next `run`.
    - An epoch is one pass over the loader, however long; `epoch_length=` makes it a number of
      iterations. `state.epoch_length` is the length of the running epoch, None until it is known.
    - The loop calls `set_epoch` of a loader, or of its sampler, with the epoch counted from 0. If
      an epoch holds several passes over the loader, each pass has its own number.

    Attributes:
        batches: the loader in use and the position in it.
        outcome: how the last `run` ended, from the events of its end on (`COMPLETED`, `TERMINATE`,
            `INTERRUPT`, `EXCEPTION_RAISED`); None while it is running, and before the first one.
    """

    def __init__(self, process_function: Callable[[Engine, Any], Any]) -> None:
        super().__init__(process_function)
        self.register_events(
            *ITERATION_EVENTS, event_to_attr=dict.fromkeys(ITERATION_EVENTS, "iteration")
        )
        self._batch: Any = None
        self.outcome: Outcome | None = None
        self._misjudged: Any = None  # the loader whose wrong length was logged
        self._has_default_length = False  # whether `run` was given no limit
        self._limits: dict[str, int | None] = {}  # the arguments of `run`
        self._waiting: list[str] = []  # the handlers that wait for the end of an epoch

    # -- starting a run --------------------------------------------------------------------------

    @names_the_right_argument
    def run(
        self,
        data: Iterable[Any] | None = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> State:
        """Run until `max_epochs` epochs or `max_iters` iterations are done, earlier runs included.

        Over several ranks, a trainer's ranks first compare their trainers; see the guide on several
        GPUs.

        Args:
            data: batches, iterated once per epoch. None: every batch is `None`.
            max_epochs: total number of epochs. Default: that of the earlier `run`, else 1, which
                is logged.
            max_iters: total number of iterations, instead of `max_epochs`.
            epoch_length: iterations per epoch. Default: that of the earlier `run`, else an epoch is
                one pass over `data`.

        Returns:
            The engine's state, as in Ignite.

        Raises:
            TypeError: if `data` is not iterable, or there is no argument of a name; the message
                gives the right one.
            ValueError: if a limit is below 1, both limits are given, or `data` is empty.
            ResumeError: if the run stopped inside an epoch of another loader, or of a loader of
                another length.
            RuntimeError: over several ranks, if the trainers of two ranks differ.
        """
        self._limits = {
            "max_epochs": max_epochs,
            "max_iters": max_iters,
            "epoch_length": epoch_length,
        }
        with self._announced():
            check_limits(data, self._limits)
            self.state.dataloader = data
            self.outcome = None
            try:
                self.fire_event(RunEvents.RESTORE)
                # A handler may have replaced the loader: a stage brings its own.
                return self._start(self.state.dataloader)
            except BaseException:
                self.outcome = Outcome.FAILED
                raise
            finally:
                last = self.last_event_name
                try:
                    self.fire_event(RunEvents.ENDED)
                except BaseException:
                    self.outcome = Outcome.FAILED
                    raise
                self.last_event_name = last  # as in Ignite: the last event of the run itself

    @contextmanager
    def _announced(self) -> Iterator[None]:
        """Enclose a run; a trainer tells the other ranks how it ended."""
        yield

    def _start(self, data: Iterable[Any] | None) -> State:
        max_epochs, max_iters, epoch_length = self._limits.values()
        if self.state.max_epochs is None and self.state.max_iters is None:
            self._start_over()
            if max_epochs is None and max_iters is None:
                max_epochs, self._has_default_length = 1, True
        if max_epochs is not None or max_iters is not None:
            self.state.max_epochs, self.state.max_iters = max_epochs, max_iters
        self._check_may_continue()
        self._set_epoch_length(data, epoch_length)
        if self.is_finished and self._position.completed:
            logger.warning(
                "Nothing to do: the run finished at epoch %d, iteration %d. "
                "Raise max_epochs or max_iters to continue it.",
                self.state.epoch,
                self.state.iteration,
            )
            self.outcome = Outcome.COMPLETED
            return self.state
        if not self.is_finished:
            self._check_continues(data)
        return self._internal_run()

    def _set_epoch_length(self, data: Iterable[Any] | None, given: int | None) -> None:
        stored, count = self.state.epoch_length, self._count if given is None else given
        if data is None and count is None:
            count = stored
        length = epoch_length_of(data, count)
        differs = len({stored, length} - {None}) == 2  # and both are known
        if self._position.has_epoch:
            if differs and not self._has_ended:  # else it needs no batch any more
                raise ResumeError(
                    f"data must have {stored} batches, the length of the running epoch, got "
                    f"{length}. Continue inside an epoch with the same data, or pass "
                    f"epoch_length={stored} to keep the length"
                )
            self._epoch_counts |= given is not None
            self.state.epoch_length = stored if given is None else given
        else:
            if differs and count is None:
                logger.warning("Epochs have %d batches from here on; before, %d.", length, stored)
            self.state.epoch_length = length  # the next epoch's, as far as it is known
        self._count = count

    def _check_continues(self, data: Iterable[Any] | None) -> None:
        same = self.batches.keeps_its_place and self.batches.data is data
        rest = not self._is_to_end and not self._has_ended
        if self.batches.lost_its_place and self.batches.data is data:
            raise ResumeError(
                f"data must have state_dict() and load_state_dict() to resume here, got a "
                f"{type(data).__name__}: the run was saved inside a pass over the data, where its "
                f"epochs of {self.state.epoch_length} iterations end. Use such a loader, or epochs "
                "of whole passes"
            )
        if self.epoch_iteration and rest and not same and not self._goes_on_in(data):
            raise ResumeError(
                f"the run stopped in epoch {self.state.epoch} after iteration "
                f"{self.epoch_iteration}, and this loader cannot be restored to that position. "
                "Continue with the loader of the earlier run, resume with a CheckpointManager, "
                "which saves the position of a loader with state_dict(), or start over with "
                "trainer.state.max_epochs = None"
            )
        if not same:
            self.set_data(data)

    def _goes_on_in(self, data: Iterable[Any] | None) -> bool:
        """Return whether the iteration of an epoch of one pass is a position of this loader."""
        if self.batches.data is not None or length_of(data) != self.state.epoch_length:
            return False  # the position is that of another loader
        self.set_data(data)
        return self.batches.go_to(self.state.epoch - 1, self.epoch_iteration)

    @property
    def is_finished(self) -> bool:
        """Whether all epochs or iterations that `run` was asked for are done."""
        # Iterations do not determine the epoch: terminate_epoch and stages change its length.
        state = self.state
        if state.max_iters is not None:
            # An epoch whose iterations are all done must be completed first.
            return self._reached_max_iters and not self._is_to_end
        return not self._position.in_epoch and state.epoch >= (state.max_epochs or 0)

    @property
    def _is_long_enough(self) -> bool:
        """Whether the running epoch has as many iterations as its length, if that is known."""
        position, length = self._position, self.state.epoch_length
        return length is not None and position.epoch_iteration >= length and position.in_epoch

    @property
    def _is_to_end(self) -> bool:
        """Whether the running epoch has no iteration left, as far as its length tells."""
        asked = bool(self.should_terminate_single_epoch) and self._position.in_epoch
        return asked or self._is_long_enough

    @property
    def _has_ended(self) -> bool:
        """Whether the running epoch is known to have no iteration left."""
        if self._position.phase in ENDED:
            return True
        return self._epoch_counts and self._is_long_enough

    @property
    def _reached_max_iters(self) -> bool:
        limit = self.state.max_iters
        return limit is not None and bool(self.state.iteration >= limit)

    # -- the loop --------------------------------------------------------------------------------

    def _internal_run(self) -> State:
        begins = not (self._continues_after_failure() or self._position.paused)
        if not self._position.in_epoch:  # inside of an epoch, a pending terminate_epoch() stays
            self.should_terminate_single_epoch = False
        started = time.perf_counter()
        try:
            # A run that is finished, but not completed, continues with its end.
            if begins and not self.is_finished:
                self._init_timers(self.state)
                self._fire_started()
                if not self._position.in_epoch:
                    self._check_epoch_has_begun()
                self._report_length_of_run()
            self._position = self._position._replace(paused=False)
            self._continue_events()
            while (self._left or not self._stopped()) and not self.is_finished:
                self._run_epoch()
            self._finish(started)
        except BaseException as error:
            self.outcome = Outcome.FAILED
            self._note_failure(begun=self._position != Position())
            self._fire_event(Events.EXCEPTION_RAISED, error)
            raise
        return self.state

    def _report_length_of_run(self) -> None:
        """Log what a user may not expect of the length of the run; handlers may have set it."""
        state = self.state
        if self._has_default_length and state.max_epochs == 1:
            logger.info(
                "The run does one epoch, since neither max_epochs nor max_iters was passed to run."
            )
        self._has_default_length = False
        ends = state.epoch_length is not None or self.batches.pass_length is not None
        if state.max_iters is not None and not ends:
            report_waiting(self.listeners, self._waiting, state.max_iters)
        self._waiting.clear()

    def waits_for_epoch(self, handler: object) -> None:
        """Note at `STARTED` that a handler waits for the end of an epoch, which may never come."""
        self._waiting.append(contract_of(handler).key)

    def _continue_events(self) -> None:
        """Call the handlers that an exception has left of the events at this position."""
        left, at_end = self._stopped_at, not self._position.in_epoch
        if Events.EPOCH_STARTED.name in left:
            self._fire(Events.EPOCH_STARTED)
        if RunEvents.SAFE_POINT.name in left and at_end:
            self._fire(RunEvents.SAFE_POINT)
        elif left.keys() & {Events.ITERATION_COMPLETED.name, RunEvents.SAFE_POINT.name}:
            if StepEvents.OPTIMIZER_STEPPED.name in left:
                self._fire(StepEvents.OPTIMIZER_STEPPED)
            self._end_iteration()

    def _stopped(self) -> bool:
        return bool(self.should_terminate or self.should_interrupt)

    @property
    def _is_to_stop(self) -> bool:
        """Whether a handler has asked to end the run or the epoch."""
        return self._stopped() or bool(self.should_terminate_single_epoch)

    def _finish(self, started: float) -> None:
        if self._left or not self._stopped():  # an end that was left is continued first
            self._end_cut_epoch()
        self.state.times[Events.COMPLETED.name] = time.perf_counter() - started
        if self.should_interrupt and not self.should_terminate:
            self._position = self._position._replace(paused=True)
            self.outcome = Outcome.INTERRUPTED
            self._fire(Events.INTERRUPT)
            self.should_interrupt = False
            return
        self._pass_is_over = False
        if self.should_terminate:
            self.outcome = Outcome.TERMINATED
            if Events.COMPLETED.name not in self._stopped_at:
                self._fire_completed(Events.TERMINATE)
        self.outcome = Outcome.TERMINATED if self.should_terminate else Outcome.COMPLETED
        if self.should_terminate != "skip_completed":
            self._completing = self._position._replace(completed=True)
            try:
                self._fire_completed(Events.COMPLETED)
            finally:
                self._completing = None
            self.state.times[Events.COMPLETED.name] = time.perf_counter() - started
        self._position = self._position._replace(completed=True)

    def _end_cut_epoch(self) -> None:
        """Do for the last weights what is due at the end of an epoch, which the run cuts."""
        if self._position.in_epoch and not self._position.cut:
            self._fire_published(RunEvents.EPOCH_CUT, MetricsEvents.CUT_PUBLISHED)
            self._position = self._position._replace(cut=True)

    def _run_epoch(self) -> None:
        started = time.perf_counter()
        if not self._position.in_epoch:
            self._move_to(self.position.epoch_started())
            self.should_terminate_single_epoch = False
            self._epoch_counts = self._count is not None
            self._take_assigned_data()
            if not self._epoch_counts:
                self.state.epoch_length = self.batches.start_epoch(self.state.epoch - 1)
            self._fire(Events.EPOCH_STARTED)
            self._check_epoch_has_begun()
        if self._left is None and not self._run_iterations():
            return
        self.state.times[Events.EPOCH_COMPLETED.name] = time.perf_counter() - started
        if self.should_terminate_single_epoch != "skip_epoch_completed":
            self._completing = self.position.epoch_completed()
            try:
                self._fire_published(Events.EPOCH_COMPLETED, MetricsEvents.EPOCH_PUBLISHED)
            finally:
                self._completing = None
            self.state.times[Events.EPOCH_COMPLETED.name] = time.perf_counter() - started
        safe_point_is_new = self._position.phase is Phase.EPOCH_ENDED
        self._move_to(self.position.epoch_completed())
        # If it has fired, the end of the epoch was not known yet.
        self._fire(RunEvents.SAFE_POINT, again=not safe_point_is_new)

    def _check_epoch_has_begun(self) -> None:
        """Refuse to end an epoch that has no iteration yet, as Ignite does."""
        if self.should_terminate_single_epoch and not self.epoch_iteration:
            self.should_terminate_single_epoch = False
            raise RuntimeError(
                "terminate_epoch() must be called inside an epoch, got a call at STARTED or "
                "EPOCH_STARTED. Call it at GET_BATCH_STARTED or later, or terminate() to end the "
                "run"
            )

    def _run_iterations(self) -> bool:
        """Run the rest of the epoch; return whether it has ended."""
        state = self.state
        while not self._stopped():
            if self.should_terminate_single_epoch:
                self._fire_event(Events.TERMINATE_SINGLE_EPOCH, iter_counter=self.epoch_iteration)
                self.batches.rewind()
                self._pass_is_over = False
                return True
            if self._has_ended:
                self._rewind_whole_pass()
                return True
            if self._reached_max_iters and not self._is_long_enough:
                return False
            if self._position.phase is not BEFORE_STEP:
                self._fetch()
            if self._position.phase is not BEFORE_STEP:
                continue
            if self._is_long_enough:
                self._extend_epoch()
            else:  # no stop between batch and step
                self._run_iteration(state)
        return False

    def _rewind_whole_pass(self) -> None:
        """Start a new pass with the next epoch if this one, by its count, was a whole pass."""
        self._pass_is_over = True
        if self._epoch_counts:
            self._pass_is_over = length_of(self.batches.data) == self.state.epoch_length
            if self._pass_is_over:
                self.batches.rewind()

    @waits_at("an iteration")
    def _run_iteration(self, state: State) -> None:
        left, started = self._stopped_at, False
        state.batch = self._batch
        try:
            begun = left and left.keys() & {Events.ITERATION_STARTED.name, STEP}
            if not begun and self.batches.data is not None:
                self._fire(Events.GET_BATCH_COMPLETED)
                if self.should_terminate_single_epoch:
                    self._position = self._position.batch_dropped()
                    return
            self._move_to(self.position.step_started())
            started = True
            if STEP not in left:
                self._fire(Events.ITERATION_STARTED)
            self._batch = state.batch
            state.output = self._call_step(state.batch)
        except BaseException:
            self._fail_iteration(state, started=started)
            raise
        self._move_to(self.position.step_completed())
        self._end_iteration()

    def _fail_iteration(self, state: State, *, started: bool) -> None:
        """Move to the place from which the next run continues an iteration that has raised."""
        if Events.ITERATION_COMPLETED.name in self._stopped_at:  # its update counts
            self._move_to(self.position.step_completed())
        elif started:
            self._move_to(self.position.step_failed())
        if STEP not in self._stopped_at:
            self._batch = state.batch  # handlers may have changed it, and are not called again

    def _end_iteration(self) -> None:
        """Fire the events after a step; after an exception, what is left of them."""
        safe = RunEvents.SAFE_POINT
        if not self._stopped_at or safe.name not in self._stopped_at:
            self._fire(Events.ITERATION_COMPLETED)
        try:
            ends = self._is_to_end and not self._stopped() and self._ends_here()
        except BaseException:
            # The loader was asked for a batch. The iteration is done: what is due behind it must
            # not be lost with this process.
            self._fire(safe)
            raise
        if ends:
            self._stopped_at.pop(safe.name, None)
            self._position = self._position.epoch_ended()
        else:
            self._fire(safe)

    def _ends_here(self) -> bool:
        """Return whether an epoch that has reached its length has ended."""
        if self._epoch_counts or self.should_terminate_single_epoch:
            return True
        if self.batches.has_more(self.state.epoch - 1):
            self._extend_epoch()
            return False
        return True

    def _extend_epoch(self) -> None:
        """Continue an epoch whose loader yields more batches than its length."""
        self._report_length(f"more than {self.state.epoch_length}")
        self.state.epoch_length = None

    def _end_pass(self) -> None:
        """Set the length of an epoch to the number of batches that the loader has yielded."""
        if self.state.epoch_length not in {None, self.epoch_iteration}:
            self._report_length(f"{self.epoch_iteration}")
        self.state.epoch_length = self.epoch_iteration
        self._position = self._position.pass_ended()

    def _report_length(self, found: str) -> None:
        """Log, once per loader, that its length is wrong."""
        if self._misjudged is not self.batches.data:
            self._misjudged = self.batches.data
            logger.warning(
                "The loader has the length %d, but yields %s batches in epoch %d.\nAn epoch is one "
                "pass over it; pass epoch_length= to count iterations instead.",
                self.state.epoch_length,
                found,
                self.state.epoch,
            )

    def terminate(self, skip_completed: bool | Engine = False) -> None:  # noqa: FBT001, FBT002 - Ignite's
        """End the run at the end of the running iteration.

        Args:
            skip_completed: whether to skip `COMPLETED`. An engine, which an event passes to its
                handlers, does not count as True.
        """
        super().terminate(skip_completed is True)

    def terminate_epoch(self, skip_epoch_completed: bool | Engine = False) -> None:  # noqa: FBT001, FBT002
        """End the epoch at the end of the running iteration; see `terminate`.

        Args:
            skip_epoch_completed: whether to skip `EPOCH_COMPLETED`.
        """
        super().terminate_epoch(skip_epoch_completed is True)

    def make_update(self, batch: Any) -> Any:
        """Call the step with a batch outside of any run, and return its output."""
        return self._process_function(self, batch)

    # -- batches ---------------------------------------------------------------------------------

    def set_data(self, data: Iterable[Any] | None) -> None:
        """Take the next batches from `data`.

        An epoch that has begun keeps its length, if that is known. A loader that a handler assigns
        to `state.dataloader` is used from the next pass on.

        Args:
            data: batches, iterated once per epoch.
        """
        self.state.dataloader = data
        self.batches.switch(data)
        self._position = self._position.batch_dropped()
        if self._position.in_epoch and not self._epoch_counts:
            if self.epoch_iteration:
                self._epoch_counts = self.state.epoch_length is not None
            else:
                self.state.epoch_length = self.batches.start_epoch(self.state.epoch - 1)

    def _fetch(self) -> None:
        """Fetch the next batch, or end the pass; stop before if a handler asks for it."""
        self._batch = self.state.batch = None  # free the last batch before the next one is made
        if not self._position.epoch_iteration:
            self._take_assigned_data()
        is_announced = self._pass_is_over
        self._announce_batch()
        if self._is_to_stop:
            return
        self._stopped_at.clear()
        try:
            self._batch = self._next_batch()
        except StopIteration:
            if not self._fetch_from_next_pass(is_announced=is_announced):
                return
        except BaseException:
            self._stopped_at[FETCH] = ()
            raise
        self._position = self._position.batch_fetched()

    def _announce_batch(self) -> None:
        """Fire the events before a batch, unless an exception has left them behind."""
        left = self._stopped_at
        begun = left and left.keys() & {FETCH, Events.DATALOADER_STOP_ITERATION.name}
        if not begun and self.batches.data is not None and not self._is_long_enough:
            self._fire(Events.GET_BATCH_STARTED)
        if self._pass_is_over and not self._is_to_stop:
            self._start_next_pass()

    def _fetch_from_next_pass(self, *, is_announced: bool) -> bool:
        """Fetch the first batch of another pass; return False if the epoch or the run ends."""
        if self.epoch_iteration and not self._epoch_counts:
            self._end_pass()
            return False
        if not is_announced:
            self._start_next_pass()
        if self._is_to_stop:
            return False
        self._batch = self._first_batch()
        return True

    def _start_next_pass(self) -> None:
        """Let handlers assign another loader where the iterator of the one in use has ended."""
        self._pass_is_over = True
        if self.batches.data is not None:  # without, its events do not fire, as in Ignite
            self._fire(Events.DATALOADER_STOP_ITERATION)
            self._take_assigned_data()
        self._pass_is_over = False

    def _take_assigned_data(self) -> None:
        """Use the loader that a handler has assigned to `state.dataloader`."""
        if self.state.dataloader is not self.batches.data:
            self.set_data(self.state.dataloader)

    def _next_batch(self) -> Any:
        length = self.state.epoch_length if self._epoch_counts else None
        return self.batches.next(self.state.epoch - 1, self._position.epoch_iteration, length)

    def _first_batch(self) -> Any:
        try:
            return self._next_batch()
        except StopIteration:
            raise ResumeError(
                "data must yield batches each time it is iterated, got none after iteration "
                f"{self.epoch_iteration} of epoch {self.state.epoch}. Pass a list or a DataLoader, "
                "not a generator"
            ) from None
