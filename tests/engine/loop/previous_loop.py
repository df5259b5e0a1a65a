"""The run loop with flags, as it was before `Position`: the oracle of `test_position`.

It checks no argument and measures no time. What came later was added, with flags too: an epoch that
is longer than a new epoch_length ends, and does not run for ever; `EPOCH_CUT`; a finished run whose
`COMPLETED` is still to fire; stops before a batch is fetched; `DATALOADER_STOP_ITERATION` between
two epochs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ignite.engine import Engine, Events, State

from diptych.engine.data.batch_source import BatchSource
from diptych.engine.data.loader_contract import length_of
from diptych.engine.errors import ResumeError
from diptych.engine.events import ITERATION_EVENTS, RunEvents
from diptych.engine.loop.dispatcher import Dispatcher


class PreviousLoop(Dispatcher):
    """An engine whose runs can be stopped and continued at any iteration; see `EventLoop`."""

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

    def run(self, data: Iterable[Any], **limits: int) -> State:
        """Run until `max_epochs` epochs or `max_iters` iterations are done, all runs counted."""
        self.state.dataloader = data
        try:
            self.fire_event(RunEvents.RESTORE)
            return self._start(data, **limits)
        finally:
            self.fire_event(RunEvents.ENDED)

    def _start(
        self,
        data: Iterable[Any],
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> State:
        if self.state.max_epochs is None and self.state.max_iters is None:
            self._start_over()
        self.state.max_epochs, self.state.max_iters = max_epochs, max_iters
        self._set_epoch_length(data, epoch_length)
        if self.is_finished and self._completed:
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

    def _set_epoch_length(self, data: Iterable[Any], given: int | None) -> None:
        stored = self.state.epoch_length
        length = length_of(data) if given is None else given
        if length is None:
            return
        if stored not in {None, length} and (given is None or self._in_epoch):
            raise ResumeError("the loader has another length")
        self.state.epoch_length = length

    def _check_continues(self, data: Iterable[Any]) -> None:
        same = self.batches.keeps_its_place and self.batches.data is data
        if self.batches.lost_its_place and self.batches.data is data:
            raise ResumeError("the run was saved inside a pass over the data")
        if self.epoch_iteration and not self._long_enough() and not same:
            raise ResumeError("the loader does not say how to go to the iteration")
        if not same:
            self.state.dataloader = data
            self.batches.switch(data)
            self._batch_pending = False

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
        asked = bool(self.should_terminate_single_epoch)
        return self._in_epoch and (self._long_enough() or asked)

    # -- the loop --------------------------------------------------------------------------------

    def _internal_run(self) -> State:
        self.should_terminate = self.should_interrupt = False
        if not self._in_epoch:  # an epoch that was to end when the run stopped in it still is
            self.should_terminate_single_epoch = False
        try:
            if not self._interrupted and not self.is_finished:
                self.fire_event(Events.STARTED)
            self._interrupted = False
            while not self._stopped() and not self.is_finished:
                self._run_epoch()
            self._finish()
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

    def _finish(self) -> None:
        if self._in_epoch and not self._cut and not self._stopped():
            self.fire_event(RunEvents.EPOCH_CUT)
            self._cut = True
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
        if not self._in_epoch:
            self.state.epoch += 1
            self._in_epoch = self._safe_point_fired = True
            self._cut = self._completed = False
            self.should_terminate_single_epoch = False
            self.fire_event(Events.EPOCH_STARTED)
        if not self._run_iterations():
            return
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

    def _run_iteration(self, state: State) -> None:
        state.batch = self._batch
        self.fire_event(Events.GET_BATCH_COMPLETED)
        if self.should_terminate_single_epoch:
            self._batch_pending = False
            return
        state.iteration += 1
        self.fire_event(Events.ITERATION_STARTED)
        state.output = self._process_function(self, state.batch)
        self._batch_pending = False
        self.epoch_iteration += 1
        self.fire_event(Events.ITERATION_COMPLETED)
        self._safe_point_fired = not self._is_to_end or self._stopped()
        if self._safe_point_fired:
            self.fire_event(RunEvents.SAFE_POINT)

    # -- batches ---------------------------------------------------------------------------------

    def _fetch(self) -> bool:
        """Take the next batch; return False where an epoch of unknown length ends."""
        state = self.state
        self.fire_event(Events.GET_BATCH_STARTED)
        if self._to_stop():
            return True
        if self._pass_over:
            self.fire_event(Events.DATALOADER_STOP_ITERATION)
            self._pass_over = False
            if self._to_stop():
                return True
        try:
            self._batch = self._next_batch()
        except StopIteration:
            if state.epoch_length is None and self.epoch_iteration:
                return False
            self.fire_event(Events.DATALOADER_STOP_ITERATION)
            if self._to_stop():
                return True
            self._batch = self._next_batch()
        self._batch_pending = True
        self._cut = self._completed = False
        return True

    def _next_batch(self) -> Any:
        state = self.state
        return self.batches.next(state.epoch - 1, self.epoch_iteration, state.epoch_length)

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> OrderedDict[str, Any]:
        """Return the position of the run: Ignite's keys, `epoch` and `epoch_iteration`."""
        limit = "max_epochs" if self.state.max_iters is None else "max_iters"
        keys = ("epoch_length", "iteration", "epoch", limit)
        position = OrderedDict((key, getattr(self.state, key)) for key in keys)
        position["epoch_iteration"] = self.epoch_iteration
        position["cut"], position["completed"] = self._cut, self._completed
        position["pass_is_over"] = self._pass_over
        if self._in_epoch and not self.epoch_iteration:  # nothing of the epoch is done
            position["epoch"] -= 1
        return position

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to the position that `state_dict` names."""
        self._start_over()
        for key in ("iteration", "epoch", "epoch_length"):
            setattr(self.state, key, state_dict[key])
        self.epoch_iteration = state_dict["epoch_iteration"]
        self._in_epoch = self._safe_point_fired = self.epoch_iteration > 0
        self._cut, self._completed = state_dict["cut"], state_dict["completed"]
        self._pass_over = state_dict["pass_is_over"]
        self.state.max_epochs = state_dict.get("max_epochs")
        self.state.max_iters = state_dict.get("max_iters")
