"""An engine with a position in its run, which a state dict holds."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from ignite.engine import Engine, Events

from diptych.engine.data.batch_source import BatchSource
from diptych.engine.distributed.hang_report import entered_places
from diptych.engine.errors import ResumeError
from diptych.engine.events import EvaluationEvents
from diptych.engine.loop.continued_events import ContinuedEvents
from diptych.engine.loop.left_event import LeftEvent, left_event
from diptych.engine.loop.position import Position, ignite_position, position_from

logger = logging.getLogger(__name__)


class PositionedEvents(ContinuedEvents):
    """An engine with a position in its run, which a state dict holds.

    Attributes:
        batches: the loader in use and the position in it.
    """

    def __init__(self, process_function: Callable[[Engine, Any], Any]) -> None:
        super().__init__(process_function)
        self._position = Position()
        self.batches = BatchSource()
        self._count: int | None = None  # iterations of an epoch, if `run` was given a number
        self._epoch_counts = False  # whether the running epoch ends at a number of iterations
        self._pass_is_over = False  # whether the next batch is the first of another pass
        self._completing: Position | None = None  # that of a state taken inside *COMPLETED
        self._warned = False  # whether a state inside EPOCH_COMPLETED was reported

    @property
    def position(self) -> Position:
        """The position of the run; epoch and iteration are those of `state`."""
        position, state = self._position, self.state
        if position.epoch == state.epoch and position.iteration == state.iteration:
            return position
        return position._replace(epoch=state.epoch, iteration=state.iteration)

    @property
    def epoch_iteration(self) -> int:
        """Iterations of the running epoch that are done; 0 between two epochs."""
        return self._position.epoch_iteration

    @property
    def completed(self) -> bool:
        """Whether `COMPLETED` has fired at this position; a finished run without it fires it alone.

        Set it to False after loading a state of a process that ended inside `COMPLETED`.
        """
        return self._position.completed

    @completed.setter
    def completed(self, completed: bool) -> None:
        """Set whether `COMPLETED` has fired at this position."""
        self._position = self._position._replace(completed=completed)

    @property
    def counts_iterations(self) -> bool:
        """Whether `run` was given the length of an epoch, which else is a pass over the loader."""
        return self._count is not None

    @property
    def inside_epoch(self) -> bool:
        """Whether the epoch has begun and its end has not, so that its loader must continue."""
        return self._position.inside_epoch

    @property
    def left_event(self) -> LeftEvent | None:
        """The event of an iteration or an epoch that an exception has left, for a checkpoint.

        The next `run` continues it. None also where a state cannot hold what is left.
        """
        name, stopped = self._left or Events.ITERATION_COMPLETED.name, dict(self._stopped_at)
        evaluated = stopped.pop(EvaluationEvents.EVALUATED.name, ())
        if self._left or stopped.keys() == {name}:
            return LeftEvent(name, stopped.get(name, ()), evaluated)
        return None

    def _move_to(self, position: Position) -> None:
        self._position = position
        self.state.epoch, self.state.iteration = position.epoch, position.iteration

    def _start_over(self) -> None:
        self._move_to(Position())
        self._forget_failure()
        self._pass_is_over = False
        self.state.epoch_length = self._count = None
        self.batches.rewind()

    def state_dict(self) -> OrderedDict[str, Any]:
        """Return the position of the run: Ignite's keys plus `epoch` and `epoch_iteration`.

        Inside a handler of `EPOCH_COMPLETED` the epoch counts as done, as in Ignite: a run that
        loads the state starts the next epoch. Handlers of the event that have not run yet do not
        run for this epoch then; they are logged once. Inside `COMPLETED` the run counts as
        completed.
        """
        limit = "max_epochs" if self.state.max_iters is None else "max_iters"
        keys = ("epoch_length", "iteration", "epoch", limit)
        state = OrderedDict((key, getattr(self.state, key)) for key in keys)
        position = self._completing or self._position
        state["epoch_iteration"] = position.epoch_iteration
        state["counted"] = self._count is not None
        state["cut"], state["completed"] = position.cut, position.completed
        state["pass_is_over"] = self._pass_is_over
        if self.left_event is not None:
            asked = {"phase": position.phase.value, "terminate": self.should_terminate}
            state["left"] = {**self.left_event.state_dict(), **asked}
        if self._completing is not None and not position.completed:
            self._log_handlers_to_come()
        else:
            state["epoch"] += position.epochs_to_count
        state.update((key, getattr(self.state, key)) for key in self.state_dict_user_keys)
        return state

    def _log_handlers_to_come(self) -> None:
        """Log, once, the handlers of `EPOCH_COMPLETED` that a resumed run leaves out."""
        listeners = self._listeners.get(Events.EPOCH_COMPLETED, [])
        running = {id(name) for name, _ in entered_places()}
        begun = [n for n, listener in enumerate(listeners) if id(listener) in running]
        later = [listener.name for listener in listeners[begun[0] + 1 :]] if begun else []
        if later and not self._warned:
            self._warned = True
            logger.warning(
                "A state was taken in EPOCH_COMPLETED before these handlers: %s.\nA run resumed "
                "from it skips them in this epoch. Take states last, or at RunEvents.SAFE_POINT.",
                ", ".join(later),
            )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a position.

        Args:
            state_dict: from `state_dict()` of this class or of an Ignite engine.

        Raises:
            TypeError: if it is not a mapping.
            ResumeError: if a key is missing, or keys contradict each other.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"state_dict must be a mapping, got a {type(state_dict).__name__}. To resume from "
                "a file, attach CheckpointManager(directory, resume=path)"
            )
        keys = self.state_dict_user_keys
        if "epoch_iteration" in state_dict:
            missing = [key for key in ("epoch_length", *keys) if key not in state_dict]
            if missing:
                raise ResumeError(f"state_dict must have {missing}, got only {sorted(state_dict)}")
            position = position_from(state_dict)
        else:
            position = ignite_position(state_dict, keys)
        self._start_over()
        self.state.epoch_length = state_dict["epoch_length"]
        self._count = state_dict["epoch_length"] if state_dict.get("counted") else None
        self._epoch_counts = self._count is not None
        self._pass_is_over = state_dict.get("pass_is_over", False)
        self._restore_left(state_dict.get("left"))
        self._move_to(position)
        self.state.max_epochs = state_dict.get("max_epochs")
        self.state.max_iters = state_dict.get("max_iters")
        for key in keys:
            setattr(self.state, key, state_dict[key])

    def _restore_left(self, state: Mapping[str, Any] | None) -> None:
        """Restore the event that was left; a run that was to end before ends after it."""
        self._stop_flags = (state.get("terminate", False) if state else False, False)
        left = left_event(state)
        if left is None:
            return
        self._left = None if left.in_iteration else left.event
        if left.evaluated:
            self._stopped_at[EvaluationEvents.EVALUATED.name] = left.evaluated
        if (
            left.in_iteration or left.done
        ):  # else what precedes an epoch's end is still to be logged
            self._stopped_at[left.event] = left.done
