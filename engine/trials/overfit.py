"""Overfitting a few batches: the test that a model can learn at all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import attrs
from ignite.engine import Events

from diptych._summaries import Summarized
from diptych.engine.checks import as_number
from diptych.engine.errors import BatchError
from diptych.engine.trials.first_batches import first_batches
from diptych.engine.trials.restored import parts_preserved

LEARNS, SLOW = 0.5, 0.05
"""Shares of its first value by which the loss must have fallen: it learns; it learns slowly."""


@attrs.frozen(repr=False)
class Overfit(Summarized):
    """The losses of updates on the same few batches.

    Attributes:
        losses: the loss of each update.
        batches: the number of batches.
    """

    _shown = ("batches", "first", "last", "verdict")

    losses: tuple[float, ...]
    batches: int = 1

    @property
    def first(self) -> float:
        """The mean loss of the batches at their first update."""
        return statistics.fmean(self.losses[: self.batches])

    @property
    def last(self) -> float:
        """The mean loss of the batches at their last update."""
        return statistics.fmean(self.losses[-self.batches :])

    @property
    def learns(self) -> bool:
        """Whether the loss has fallen by half of its first value."""
        return self._fall >= LEARNS

    @property
    def verdict(self) -> str:
        """What the losses say about the model, and what to try."""
        if not all(map(math.isfinite, self.losses)):
            return "it diverges: the loss is not finite. Lower the learning rate"
        if self._fall >= LEARNS:
            return "it learns"
        if self._fall >= SLOW:
            return "it learns slowly. Raise the learning rate, or pass more updates"
        if self._fall > -SLOW:
            return (
                "it does not learn: the loss stays. Check that parameters are trainable and in the "
                "optimizer, that the learning rate is not 0, and that the loss depends on the model"
            )
        return "it diverges: the loss grows. Lower the learning rate"

    @property
    def _fall(self) -> float:
        """The fall of the loss, as a share of its first value."""
        fall = (self.first - self.last) / max(abs(self.first), 1e-12)
        return fall if math.isfinite(fall) else -math.inf

    def __str__(self) -> str:
        noun = "batch" if self.batches == 1 else "batches"
        return (
            f"{len(self.losses)} updates on {self.batches} {noun}: loss {self.first:.4g} -> "
            f"{self.last:.4g}; {self.verdict}"
        )


def overfit(trainer: Any, loader: Iterable[Any], batches: int, updates: int) -> Overfit:
    """Train on the first batches alone, and restore the trainer; see `Trainer.overfit`."""
    repeated = first_batches(loader, batches)
    if not repeated:
        raise BatchError("loader must have at least one batch, got an empty loader")
    losses: list[float] = []

    def note() -> None:
        loss = loss_of(trainer)
        if loss is None:
            raise TypeError(
                "step must return the loss, or an object with a loss, to overfit a batch, got "
                f"{type(trainer.state.output).__name__}"
            )
        losses.append(loss)

    with parts_preserved(trainer), trainer.renewed(log_every=1):
        trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
        trainer.run(repeated, max_iters=updates)
    return Overfit(tuple(losses), len(repeated))


def loss_of(trainer: Any) -> float | None:
    """Return the loss of the last update; None if a step of the user's own returns none."""
    output = trainer.state.output
    return as_number(getattr(output, "loss", output))
