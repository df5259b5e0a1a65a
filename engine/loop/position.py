"""The position of a run: a value, and the transitions between positions."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ignite.engine import Engine, State

from diptych.engine.errors import ResumeError


class Phase(enum.Enum):
    """The next thing that the loop does.

    Attributes:
        BETWEEN_EPOCHS: starts an epoch.
        BEFORE_BATCH: fetches a batch, or ends the epoch if it has no iteration left.
        BEFORE_STEP: runs the step with the batch that it has fetched.
        EPOCH_ENDED: fires `EPOCH_COMPLETED`; the last iteration's safe point is still to come.
        PASS_ENDED: fires `EPOCH_COMPLETED`; the last iteration's safe point has fired.
    """

    BETWEEN_EPOCHS = "between_epochs"
    BEFORE_BATCH = "before_batch"
    BEFORE_STEP = "before_step"
    EPOCH_ENDED = "epoch_ended"
    PASS_ENDED = "pass_ended"  # noqa: S105 - no password


class Position(NamedTuple):
    """A place in a run. Each transition returns another position.

    Attributes:
        epoch: the running epoch, or between two epochs the last one; counted from 1.
        iteration: iterations that are done, over all epochs; inside a step, that step counts.
        epoch_iteration: iterations of the running epoch that are done; 0 between two epochs.
        phase: what comes next.
        paused: whether the run was interrupted, so that `run` continues it without `STARTED`.
        cut: whether `EPOCH_CUT` has fired here.
        completed: whether `COMPLETED` has fired here, and its handlers have ended.
    """

    epoch: int = 0
    iteration: int = 0
    epoch_iteration: int = 0
    phase: Phase = Phase.BETWEEN_EPOCHS
    paused: bool = False
    cut: bool = False
    completed: bool = False

    @property
    def in_epoch(self) -> bool:
        """Whether an epoch runs: from `EPOCH_STARTED` to the end of the last epoch handler."""
        return self.phase is not Phase.BETWEEN_EPOCHS

    @property
    def inside_epoch(self) -> bool:
        """Whether the epoch has begun and not ended, so that its loader must continue."""
        ended = self.phase in {Phase.EPOCH_ENDED, Phase.PASS_ENDED}
        return bool(self.epoch_iteration) and not ended

    @property
    def has_epoch(self) -> bool:
        """Whether an epoch is running, or one in the state of an Ignite engine must continue."""
        return self.in_epoch or self.epoch_iteration > 0

    @property
    def epochs_to_count(self) -> int:
        """What a state adds to the epoch: one that has no iteration yet starts again.

        One in the state of an Ignite engine counts only from its start on.
        """
        if self.in_epoch == (self.epoch_iteration > 0):
            return 0
        return -1 if self.in_epoch else 1

    def epoch_started(self) -> Position:
        """Return the position at the start of the next epoch."""
        done = self.epoch_iteration  # not 0 if an Ignite engine's state was loaded
        return Position(self.epoch + 1, self.iteration, done, Phase.BEFORE_BATCH)

    def batch_fetched(self) -> Position:
        """Return the position with a batch in hand."""
        return Position(self.epoch, self.iteration, self.epoch_iteration, Phase.BEFORE_STEP)

    def step_started(self) -> Position:
        """Return the position inside the next step."""
        return Position(self.epoch, self.iteration + 1, self.epoch_iteration, Phase.BEFORE_STEP)

    def step_failed(self) -> Position:
        """Return the position before a step that has raised; it is to run again."""
        return Position(self.epoch, self.iteration - 1, self.epoch_iteration, Phase.BEFORE_STEP)

    def step_completed(self) -> Position:
        """Return the position after a step."""
        return Position(self.epoch, self.iteration, self.epoch_iteration + 1, Phase.BEFORE_BATCH)

    def batch_dropped(self) -> Position:
        """Return the position without the batch that was fetched."""
        phase = Phase.BEFORE_BATCH if self.phase is Phase.BEFORE_STEP else self.phase
        return self._replace(phase=phase)

    def epoch_ended(self) -> Position:
        """Return the position after the last step of an epoch, before its handlers."""
        return self._replace(phase=Phase.EPOCH_ENDED)

    def pass_ended(self) -> Position:
        """Return the position after a pass whose end showed when the next batch was asked for."""
        return self._replace(phase=Phase.PASS_ENDED)

    def epoch_completed(self) -> Position:
        """Return the position between this epoch and the next."""
        return Position(self.epoch, self.iteration)


def planned_iterations(state: State) -> int | None:
    """Return the iterations that a run is to have; None if its length is unknown."""
    if state.max_iters is not None:
        return int(state.max_iters)
    if state.max_epochs is None or state.epoch_length is None:
        return None
    return int(state.max_epochs * state.epoch_length)


def position_from(state_dict: Mapping[str, Any]) -> Position:
    """Return the position in a state dict of this library."""
    inside = state_dict["epoch_iteration"]
    phase = Phase.BEFORE_BATCH if inside else Phase.BETWEEN_EPOCHS
    return Position(
        state_dict["epoch"],
        state_dict["iteration"],
        inside,
        Phase(state_dict["left"]["phase"]) if "left" in state_dict else phase,
        cut=state_dict.get("cut", False),
        completed=state_dict.get("completed", True),
    )


def ignite_position(state_dict: Mapping[str, Any], user_keys: Iterable[str]) -> Position:
    """Return the position in the state dict of a stock engine, which checks it.

    Ignite counts the epochs that are complete, and starts the next one again, though some of its
    iterations may be done.

    Raises:
        TypeError: if it is not a mapping.
        ResumeError: if a key is missing, keys contradict each other, or the limit is below the
            position; the message is Ignite's.
    """
    engine = Engine(lambda *_: None)
    engine.state_dict_user_keys.extend(user_keys)
    try:
        engine.load_state_dict(state_dict)
    except ValueError as error:
        raise ResumeError(str(error)) from error
    state = engine.state
    done = state.iteration % state.epoch_length if state.epoch_length else 0
    return Position(state.epoch, state.iteration, done, completed=True)
