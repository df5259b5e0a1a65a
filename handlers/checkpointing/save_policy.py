"""The decision to save a run, as pure functions of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SavedAt = tuple[int, int]
"""The iteration of the run and that of its epoch, which is 0 between two epochs. So the end of an
epoch is another position than the last safe point inside it, though the iteration is the same."""


class SaveState(NamedTuple):
    """The state of the policy between two decisions.

    Attributes:
        due: whether the cadence has asked for a save that is still to be made.
        timeouts: how often the interval between two saves has ended, on any rank.
        values: how many values of the ranking metric have been judged; None: not known.
        saved: the position of the last save; None before the first.
    """

    due: bool = False
    timeouts: int = 0
    values: int | None = 0
    saved: SavedAt | None = None


class RunStatus(NamedTuple):
    """The status of a run at a safe point or at its end, the same on all ranks.

    Attributes:
        at: the position of the run.
        is_finished: whether the run has done all that it was asked for.
        position_is_lost: whether a run cannot resume here.
        signal: the number of a signal that asks the run to end, or 0.
        timeouts: how often the interval between two saves has ended, this time included.
        values: all values of the ranking metric so far.
        missing: an error message if the ranking metric should have had a value by now.
        save_failed: whether the last save has failed.
    """

    at: SavedAt
    is_finished: bool = False
    position_is_lost: bool = False
    signal: int = 0
    timeouts: int = 0
    values: Sequence[float] = ()
    missing: str | None = None
    save_failed: bool = False


class SaveDecision(NamedTuple):
    """A decision, whose parts are carried out in this order.

    Attributes:
        state: the state for the next decision.
        save: whether to save the run.
        score: the score of the checkpoint, or None.
        missing: the message of an error to raise, or None.
        signal: the number of the signal on which to end the process, or 0.
    """

    state: SaveState
    save: bool = False
    score: float | None = None
    missing: str | None = None
    signal: int = 0


def decide_at_safe_point(state: SaveState, status: RunStatus) -> SaveDecision:
    """Decide whether to save at a safe point.

    A new score is always saved, since nothing else holds the weights that have it. Whatever else
    asks for a save waits for a position from which a run can resume. The end of a finished run is
    left to `decide_at_end`: its last log point is still to come.
    """
    if status.timeouts > state.timeouts:
        state = state._replace(due=True, timeouts=status.timeouts)
    if status.is_finished:
        return SaveDecision(state)
    state, score = _judge(state, status)
    asked = state.due or status.signal > 0 or status.missing is not None
    save = score is not None or (asked and not status.position_is_lost)
    if save:
        state = _saved(state, status)
    return SaveDecision(state, save, score, status.missing, status.signal)


def decide_at_restore(state: SaveState, status: RunStatus) -> SaveDecision:
    """Decide whether to save what was loaded: if it has a score that is still to be judged.

    Another manager saved this position first, and the process ended before this one did. At the
    next safe point the weights would be others.
    """
    state, score = _judge(state, status)
    if score is None:
        return SaveDecision(state)
    return SaveDecision(_saved(state, status), True, score)


def decide_at_end(state: SaveState, status: RunStatus) -> SaveDecision:
    """Decide whether to save at the end of a run: always, unless the last save holds this state.

    It does not hold a score that was published since, by an evaluation that is repeated here.
    """
    missing = status.missing if status.is_finished else None
    state, score = _judge(state, status)
    if score is None and state.saved == status.at and not status.save_failed:
        return SaveDecision(state, missing=missing)
    return SaveDecision(_saved(state, status), True, score, missing)


def _judge(state: SaveState, status: RunStatus) -> tuple[SaveState, float | None]:
    """Return the state with all values judged, and the last value if there are new ones."""
    values = status.values
    if len(values) == state.values:
        return state, None
    # With fewer values the run has started over.
    return state._replace(values=len(values)), values[-1] if values else None


def _saved(state: SaveState, status: RunStatus) -> SaveState:
    return state._replace(due=state.due and status.position_is_lost, saved=status.at)
