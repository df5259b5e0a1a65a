"""The decision to save a run, as pure functions of plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SavedAt = tuple[int, int]
"""Iteration, and iteration of the epoch: the last iteration ends before its epoch does."""


class Memory(NamedTuple):
    """The values that a decision leaves for the next one.

    Attributes:
        due: whether the cadence has asked for a save that is still to be made.
        timeouts: how often the interval between two saves has ended, on any rank.
        values: how many values of the ranking metric have been judged; None: not known.
        saved: the place of the last save; None before the first.
    """

    due: bool = False
    timeouts: int = 0
    values: int | None = 0
    saved: SavedAt | None = None


class Known(NamedTuple):
    """What is known of a run at a safe point or at its end, the same on all ranks.

    Attributes:
        at: the place of the run.
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


class Decision(NamedTuple):
    """What to do, in this order.

    Attributes:
        memory: the memory for the next decision.
        save: whether to save the run.
        score: the score of the checkpoint, or None.
        missing: the message of an error to raise, or None.
        signal: the number of the signal on which to end the process, or 0.
    """

    memory: Memory
    save: bool = False
    score: float | None = None
    missing: str | None = None
    signal: int = 0


def decide_at_safe_point(memory: Memory, known: Known) -> Decision:
    """Decide whether to save at a safe point.

    A new score is always saved, since nothing else holds the weights that have it. Whatever else
    asks for a save waits for a position from which a run can resume. The end of a finished run is
    left to `decide_at_end`: its last log point is still to come.
    """
    if known.timeouts > memory.timeouts:
        memory = memory._replace(due=True, timeouts=known.timeouts)
    if known.is_finished:
        return Decision(memory)
    memory, score = _judge(memory, known)
    asked = memory.due or known.signal > 0 or known.missing is not None
    save = score is not None or (asked and not known.position_is_lost)
    if save:
        memory = _saved(memory, known)
    return Decision(memory, save, score, known.missing, known.signal)


def decide_at_end(memory: Memory, known: Known) -> Decision:
    """Decide whether to save at the end of a run: always, unless the last save holds this state."""
    missing = known.missing if known.is_finished else None
    if memory.saved == known.at and not known.save_failed:
        return Decision(memory, missing=missing)
    memory, score = _judge(memory, known)
    return Decision(_saved(memory, known), True, score, missing)


def _judge(memory: Memory, known: Known) -> tuple[Memory, float | None]:
    """Return the memory with all values judged, and the last value if there are new ones."""
    values = known.values
    if len(values) == memory.values:
        return memory, None
    # With fewer values the run has started over.
    return memory._replace(values=len(values)), values[-1] if values else None


def _saved(memory: Memory, known: Known) -> Memory:
    return memory._replace(due=memory.due and known.position_is_lost, saved=known.at)
