"""The position of a run in the state dict of a stock Ignite engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ignite.engine import Engine

from diptych.engine.errors import ResumeError
from diptych.engine.loop.position import Position


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
