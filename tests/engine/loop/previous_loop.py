"""The run loop with flags, as it was before `Position`: the oracle of `test_position`.

What came later was added, with flags too: an epoch that is longer than a new epoch_length ends, and
does not run for ever; `EPOCH_CUT`; a finished run whose `COMPLETED` is still to fire; stops before
a batch is fetched; `DATALOADER_STOP_ITERATION` between two epochs.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any

from ignite.engine import Engine, Events, State

from diptych.engine.data.batch_source import BatchSource
from diptych.engine.data.loader_contract import length_of
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import ResumeError
from diptych.engine.events import ITERATION_EVENTS, RunEvents
from diptych.engine.loop.dispatcher import Dispatcher

logger = logging.getLogger(__name__)


class PreviousLoop(Dispatcher):
    """An Ignite `Engine` whose runs can be stopped and continued at any iteration.

    What differs from the base class:

    - A finished run that is started again says so and does nothing; a larger `max_epochs`
      continues it. (`state.max_epochs = None` before `run` starts over, as in Ignite.)
    - `terminate()` and `interrupt()` take effect when the running iteration has ended, never in
      its middle. The next `run` with the same loader continues with the next batch of the epoch.
    - An exception always reaches the caller. `EXCEPTION_RAISED` fires once before it does. An
      iteration whose step did not end does not count; the next `run` repeats it with its batch,
      from `GET_BATCH_COMPLETED` on.
    - Another loader in the middle of an epoch, or one of another length, is an error.
    - `EPOCH_STARTED` fires once an epoch, also when the epoch is continued later.
    - A loader that has `set_epoch` (or whose sampler has) is told the epoch, counted from 0;
      where an epoch holds several passes, each pass has a number of its own.

    Attributes:
        epoch_iteration: batches of the running epoch that are done; 0 between two epochs.
        batches: the loader in use and the place in it.
    """

    def __init__(self, process_function: Callable[[Engine, Any], Any]) -> None:
        super().__init__(process_function)
        self.register_events(
            *ITERATION_EVENTS, event_to_attr=dict.fromkeys(ITERATION_EVENTS, "iteration")
        )
        self.epoch_iteration = 0
        self._in_epoch = False
        self._interrupted = False
        self._cut = self._completed = self._pass_over = False
        self._batch: Any = None
        self._batch_pending = False
        self._safe_point_fired = False
        self.batches = BatchSource()

    # -- what a run starts from ------------------------------------------------------------------

    def run(
        self,
        data: Iterable[Any] | None = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> State:
        """Run until `max_epochs` epochs or `max_iters` iterations are done, all runs counted.

        Args:
            data: batches that can be iterated once an epoch. None gives `None` as every batch.
            max_epochs: epochs in all. Default: what an earlier run was given, else 1.
            max_iters: iterations in all, instead of `max_epochs`.
            epoch_length: iterations of an epoch. Default: `len(data)` where it has a length, else
                the number of batches that the first epoch gives.

        Returns:
            The state, as Ignite's engines do.

        Raises:
            TypeError: if `data` cannot be iterated.
            ValueError: if a limit is below 1, both limits are given, or `data` is empty.
            ResumeError: if the run stands in the middle of an epoch of another loader, or `data`
                has another length than the run began with.
        """
        _check_limits(data, max_epochs, max_iters, epoch_length)
        self.state.dataloader = data
        try:
            self.fire_event(RunEvents.RESTORE)
            # A handler may have put another loader in its place: that of a stage.
            return self._start(self.state.dataloader, max_epochs, max_iters, epoch_length)
        finally:
            self.fire_event(RunEvents.RELEASE)

    def _start(
        self,
        data: Iterable[Any] | None,
        max_epochs: int | None,
        max_iters: int | None,
        epoch_length: int | None,
    ) -> State:
        if self.state.max_epochs is None and self.state.max_iters is None:
            self._start_over()
            max_epochs = 1 if max_epochs is None and max_iters is None else max_epochs
        if max_epochs is not None or max_iters is not None:
            self.state.max_epochs, self.state.max_iters = max_epochs, max_iters
        self._set_epoch_length(data, epoch_length)
        if self.is_finished and self._completed:
            logger.warning(
                "nothing to do: the run is finished at epoch %d, iteration %d; "
                "raise max_epochs or max_iters to continue it",
                self.state.epoch,
                self.state.iteration,
            )
            return self.state
        if not self.is_finished:
            self._check_continues(data)
        return self._internal_run()

    def _start_over(self) -> None:
        self.state.iteration = self.state.epoch = self.epoch_iteration = 0
        self.state.epoch_length = None
        self._in_epoch = self._interrupted = self._batch_pending = self._safe_point_fired = False
        self._cut = self._completed = self._pass_over = False
        self.batches.rewind()

    def _set_epoch_length(self, data: Iterable[Any] | None, given: int | None) -> None:
        stored = self.state.epoch_length
        length = length_of(data) if given is None else given
        if length is None:
            if data is None and stored is None:
                raise ValueError("epoch_length must be given when data is None, got neither")
            return
        if length < 1:
            raise ValueError("data must hold at least one batch, got an empty loader")
        if stored not in {None, length} and (given is None or self._in_epoch):
            raise ResumeError(
                f"the run has epochs of {stored} iterations, and this loader gives {length}: "
                f"continue with data of the same length, or say epoch_length={stored} to keep the "
                f"length, or, between two epochs, epoch_length={length} to change it"
            )
        self.state.epoch_length = length

    def _check_continues(self, data: Iterable[Any] | None) -> None:
        same = self.batches.keeps_its_place and self.batches.data is data
        rest = self.state.epoch_length is None or self.epoch_iteration < self.state.epoch_length
        if self.batches.lost_its_place and self.batches.data is data:
            raise ResumeError(
                f"epochs of {self.state.epoch_length} iterations end inside a pass over the data, "
                f"where the run was saved, and a {type(data).__name__} cannot go there: use a "
                "loader with state_dict() and load_state_dict(), or epochs of whole passes"
            )
        if self.epoch_iteration and rest and not same:
            raise ResumeError(
                f"epoch {self.state.epoch} stands at iteration {self.epoch_iteration}, and this "
                "loader does not say how to go there: continue with the loader of the earlier run, "
                "use one with state_dict() and load_state_dict(), or start over with "
                "trainer.state.max_epochs = None"
            )
        if not same:
            self.set_data(data)

    @property
    def is_finished(self) -> bool:
        """Whether the run has done all that it was asked for."""
        # Epochs may differ in length (terminate_epoch, stages): iterations do not tell the epoch.
        state = self.state
        if state.max_iters is not None:
            # A whole epoch that is still open is to be completed first.
            return bool(state.iteration >= state.max_iters) and not self._is_to_end
        return not self._in_epoch and state.epoch >= (state.max_epochs or 0)

    @property
    def _is_to_end(self) -> bool:
        """Whether the running epoch has no iteration left."""
        length = self.state.epoch_length
        whole = length is not None and self.epoch_iteration >= length
        return self._in_epoch and (whole or bool(self.should_terminate_single_epoch))

    # -- the loop --------------------------------------------------------------------------------

    def _internal_run(self) -> State:
        self.should_terminate = self.should_interrupt = False
        if not self._in_epoch:  # an epoch that was to end when the run stopped in it still is
            self.should_terminate_single_epoch = False
        started = time.perf_counter()
        self._find_listeners()
        try:
            if not self._interrupted and not self.is_finished:
                self._init_timers(self.state)
                self.fire_event(Events.STARTED)
                self._find_listeners()  # Ignite's profilers put theirs into the table
            self._interrupted = False
            while not self._stopped() and not self.is_finished:
                self._run_epoch()
            self._finish(started)
        except BaseException as error:
            self._fire_event(Events.EXCEPTION_RAISED, error)
            raise
        return self.state

    def _stopped(self) -> bool:
        return bool(self.should_terminate or self.should_interrupt)

    def _long_enough(self) -> bool:
        length = self.state.epoch_length
        return length is not None and self.epoch_iteration >= length

    def _to_stop(self) -> bool:
        return self._stopped() or bool(self.should_terminate_single_epoch)

    def _finish(self, started: float) -> None:
        if self._in_epoch and not self._cut and not self._stopped():
            self.fire_event(RunEvents.EPOCH_CUT)
            self._cut = True
        self.state.times[Events.COMPLETED.name] = time.perf_counter() - started
        if self.should_interrupt and not self.should_terminate:
            self._interrupted = True
            self.fire_event(Events.INTERRUPT)
            return
        self._pass_over = False
        if self.should_terminate:
            self.fire_event(Events.TERMINATE)
        if self.should_terminate != "skip_completed":
            self.fire_event(Events.COMPLETED)
        self._completed = True

    def _run_epoch(self) -> None:
        started = time.perf_counter()
        if not self._in_epoch:
            self.state.epoch += 1
            self._in_epoch = self._safe_point_fired = True
            self._cut = self._completed = False
            self.should_terminate_single_epoch = False
            self.fire_event(Events.EPOCH_STARTED)
        if not self._run_iterations():
            return
        self.state.times[Events.EPOCH_COMPLETED.name] = time.perf_counter() - started
        if self.should_terminate_single_epoch != "skip_epoch_completed":
            self.fire_event(Events.EPOCH_COMPLETED)
        self._in_epoch, self.epoch_iteration = False, 0
        self._cut = self._completed = False
        if self._safe_point_fired:  # nobody could know then that the epoch was to end
            self.fire_again(RunEvents.SAFE_POINT)
        else:
            self.fire_event(RunEvents.SAFE_POINT)

    def _run_iterations(self) -> bool:
        """Run the rest of the epoch; say whether it has ended."""
        state = self.state
        while not self._stopped():
            if self.should_terminate_single_epoch:
                self._fire_event(Events.TERMINATE_SINGLE_EPOCH, iter_counter=self.epoch_iteration)
                self.batches.rewind()
                self._pass_over = False
                return True
            if self._long_enough():
                # Where an epoch is one pass over the data, the next epoch begins a new pass.
                if length_of(self.batches.data) == state.epoch_length:
                    self.batches.rewind()
                    self._pass_over = True
                return True
            if state.max_iters is not None and state.iteration >= state.max_iters:
                return False
            if not self._batch_pending and not self._fetch():
                state.epoch_length = self.epoch_iteration
                continue
            if self._batch_pending:
                self._run_iteration(state)
        return False

    @waits_at("an iteration")
    def _run_iteration(self, state: State) -> None:
        state.batch = self._batch  # as the loader gave it, whatever an earlier try made of it
        self.fire_event(Events.GET_BATCH_COMPLETED)
        if self.should_terminate_single_epoch:
            self._batch_pending = False
            return
        state.iteration += 1
        try:
            self.fire_event(Events.ITERATION_STARTED)
            state.output = self._process_function(self, state.batch)
        except BaseException:
            state.iteration -= 1
            raise
        self._batch_pending = False
        self.epoch_iteration += 1
        self.fire_event(Events.ITERATION_COMPLETED)
        self._safe_point_fired = not self._is_to_end or self._stopped()
        if self._safe_point_fired:
            self.fire_event(RunEvents.SAFE_POINT)

    def terminate(self, *, skip_completed: bool = False) -> None:  # type: ignore[override]
        """End the run when the running iteration has ended.

        By name only: as the handler of an event, an engine's methods must not take the engine that
        they are called with for a flag.

        Args:
            skip_completed: whether `COMPLETED` is left out.
        """
        super().terminate(skip_completed)

    def terminate_epoch(self, *, skip_epoch_completed: bool = False) -> None:  # type: ignore[override]
        """End the epoch when the running iteration has ended; see `terminate`.

        Args:
            skip_epoch_completed: whether `EPOCH_COMPLETED` is left out.
        """
        super().terminate_epoch(skip_epoch_completed)

    def make_update(self, batch: Any) -> Any:
        """Call the step with a batch, outside any run; return its output."""
        return self._process_function(self, batch)

    # -- batches ---------------------------------------------------------------------------------

    def set_data(self, data: Iterable[Any] | None) -> None:
        """Take the following batches from `data`; the length of the epoch stays.

        Args:
            data: batches that can be iterated once an epoch.
        """
        self.state.dataloader = data
        self.batches.switch(data)
        self._batch_pending = False

    def _fetch(self) -> bool:
        """Take the next batch; return False where an epoch of unknown length ends."""
        state = self.state
        self._batch = state.batch = None  # frees the last batch before the next one is made
        self.fire_event(Events.GET_BATCH_STARTED)
        if self._to_stop():
            return True
        if self._pass_over:
            self.fire_event(Events.DATALOADER_STOP_ITERATION)
            self._pass_over = False
            if self._to_stop():
                return True
        try:
            self._batch = self.batches.next(
                state.epoch - 1, self.epoch_iteration, state.epoch_length
            )
        except StopIteration:
            if state.epoch_length is None and self.epoch_iteration:
                return False
            self.fire_event(Events.DATALOADER_STOP_ITERATION)
            if self._to_stop():
                return True
            self._batch = self._first_batch()
        self._batch_pending = True
        self._cut = self._completed = False
        return True

    def _first_batch(self) -> Any:
        state = self.state
        try:
            return self.batches.next(state.epoch - 1, self.epoch_iteration, state.epoch_length)
        except StopIteration:
            raise ResumeError(
                "a loader must give batches each time it is iterated, got none after iteration "
                f"{self.epoch_iteration} of epoch {state.epoch}"
            ) from None

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> OrderedDict[str, Any]:
        """Return the position of the run: Ignite's keys, `epoch` and `epoch_iteration`."""
        limit = "max_epochs" if self.state.max_iters is None else "max_iters"
        keys = ("epoch_length", "iteration", "epoch", limit)
        position = OrderedDict((key, getattr(self.state, key)) for key in keys)
        position["epoch_iteration"] = self.epoch_iteration
        position["cut"], position["completed"] = self._cut, self._completed
        if self._in_epoch and not self.epoch_iteration:  # nothing of the epoch is done
            position["epoch"] -= 1
        position.update((key, getattr(self.state, key)) for key in self.state_dict_user_keys)
        return position

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to the position that `state_dict` names.

        Args:
            state_dict: what `state_dict()` returned, or an Ignite engine's.

        Raises:
            ResumeError: if the position is incomplete.
        """
        keys = ("iteration", "epoch_length", *self.state_dict_user_keys)
        missing = [key for key in keys if key not in state_dict]
        if missing:
            raise ResumeError(f"a run's position needs {missing}, got only {sorted(state_dict)}")
        iteration, length = state_dict["iteration"], state_dict["epoch_length"]
        if not {"max_epochs", "max_iters"} & set(state_dict):
            raise ResumeError(
                f"a run's position needs max_epochs or max_iters, got only {sorted(state_dict)}"
            )
        if iteration and not length and "epoch_iteration" not in state_dict:
            raise ResumeError(
                f"epoch_length must be >= 1 to place iteration {iteration}, got {length}"
            )
        epochs, rest = divmod(iteration, length) if length else (0, 0)
        self._start_over()
        self.state.iteration, self.state.epoch_length = iteration, length
        self.state.epoch = state_dict.get("epoch", epochs + bool(rest))
        self.epoch_iteration = state_dict.get("epoch_iteration", rest)
        self._in_epoch = self._safe_point_fired = self.epoch_iteration > 0
        self._cut, self._completed = state_dict["cut"], state_dict["completed"]
        self.state.max_epochs, self.state.max_iters = (
            state_dict.get("max_epochs"),
            state_dict.get("max_iters"),
        )
        for key in self.state_dict_user_keys:
            setattr(self.state, key, state_dict[key])


def _check_limits(
    data: Iterable[Any] | None,
    max_epochs: int | None,
    max_iters: int | None,
    epoch_length: int | None,
) -> None:
    if data is not None and not isinstance(data, Iterable):
        raise TypeError(f"data must be iterable, got {type(data).__name__}")
    if max_epochs is not None and max_iters is not None:
        raise ValueError(
            f"give max_epochs or max_iters, not both, got {max_epochs} and {max_iters}"
        )
    limits = {"max_epochs": max_epochs, "max_iters": max_iters, "epoch_length": epoch_length}
    for name, value in limits.items():
        if value is not None and not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
