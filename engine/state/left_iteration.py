"""The batch and the results of an iteration whose last event was left, for its other handlers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diptych.engine.data.batches import to_device
from diptych.engine.errors import CheckpointError
from diptych.engine.state.plain_state import plain_state

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)


def left_iteration(trainer: Trainer) -> dict[str, Any] | None:
    """Return what handlers of `ITERATION_COMPLETED` that are still to be called may read.

    A part that a checkpoint cannot hold is None, with a warning.

    Returns:
        The batch, the step's output, and the task's outputs and terms; None unless an exception has
        left the event.
    """
    left = trainer.left_event
    if left is None or not left.in_iteration:
        return None
    parts = {
        "batch": trainer.state.batch,
        "output": trainer.plain_output,
        "outputs": dict(trainer.outputs),
        "terms": dict(trainer.terms),
    }
    return {name: _plain(part, name) for name, part in parts.items()}


def restore_left_iteration(trainer: Trainer, parts: Mapping[str, Any]) -> None:
    """Restore what `left_iteration` returned."""
    trainer.state.batch = parts["batch"]
    trainer.restore_output(to_device(parts["output"], trainer.device))
    trainer.outputs = to_device(parts["outputs"] or {}, trainer.device)
    trainer.terms = to_device(parts["terms"] or {}, trainer.device)


def _plain(part: Any, name: str) -> Any:
    """Return a part as plain values; None, with a warning, if it has others."""
    try:
        return plain_state(part, name)
    except CheckpointError as error:
        logger.warning("%s. Handlers that the resumed run still calls find None.", error)
        return None
