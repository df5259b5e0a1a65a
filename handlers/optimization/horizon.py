"""The length of a schedule: fixed when the run first starts, and saved."""

from __future__ import annotations

import logging

import attrs

from diptych.engine.distributed.collectives import rank
from diptych.engine.loop.position import planned_iterations
from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class Horizon:
    """The iterations over which a schedule extends.

    It is `total` or, without one, the length that the run has when it first starts: `max_epochs`
    times the length of an epoch then, or `max_iters`. A later `run` or a resumed run keeps it,
    whatever its own length and that of its epochs; only another `total` changes it.

    Attributes:
        iterations: the length; None before the first run, or if it is unknown.
    """

    iterations: int | None = None
    _said: tuple[int | None, int | None] | None = attrs.field(default=None, init=False)

    def start(self, trainer: Trainer, total: int | None, name: str, sets: str) -> None:
        """Fix the length when a run starts, and log a run that is longer or shorter.

        A `total` is the length that the script gives.
        """
        length = planned_iterations(trainer.state)
        if trainer.state.iteration == 0:
            self.iterations = None
        if total is not None:
            self.iterations = total
        elif self.iterations is None:
            before = trainer.loaded_length if trainer.state.iteration else None
            self.iterations = before or length
            if before is not None and rank() == 0:
                logger.info(
                    "The checkpoint has no length of the schedule of %s; it is %d iterations, as "
                    "planned for the saved run.",
                    name,
                    before,
                )
        elif length is not None and (length, self.iterations) != self._said:
            self._said = (length, self.iterations)
            log_other_length(self.iterations, length, name, sets)


def log_other_length(fixed: int, length: int, name: str, sets: str) -> None:
    """Log a run, or a stage, that is longer or shorter than its schedule.

    `sets` is what the schedule sets, and `name` the handler whose `total` changes it.
    """
    if fixed == length or rank() != 0:
        return
    effect = "the run ends before the schedule does"
    if length > fixed:
        effect = f"after iteration {fixed} the {sets} keeps its final value"
    logger.warning(
        "The schedule of the %s has %d iterations, fixed when it first started, and now there are "
        "%d:\n%s. Pass total=%d to %s to change the schedule.",
        sets,
        fixed,
        length,
        effect,
        length,
        name,
    )
