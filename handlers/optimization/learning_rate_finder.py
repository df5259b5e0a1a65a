"""Which learning rate to begin with: a short search by a trainer that stays as it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import attrs
from ignite.engine import Events
from torch import Tensor

from diptych.engine.distributed.collectives import sum_over_ranks, world_size
from diptych.engine.random_state import preserved_random_state
from diptych.engine.trainer import Trainer

SMOOTHING = 0.8  # of the running mean of losses
DIVERGED = 5.0  # times the lowest loss


@attrs.frozen
class LearningRateCurve:
    """What a search has seen.

    Attributes:
        rates: learning rates, rising, one for each update.
        losses: the loss of each update's batch, before it, as a running mean.
        suggestion: the rate at which the loss falls fastest, or None where it never falls.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float | None


def find_learning_rate(
    trainer: Trainer,
    loader: Iterable[Any],
    *,
    start: float = 1e-6,
    end: float = 1.0,
    steps: int = 100,
) -> LearningRateCurve:
    """Train for a moment with a rate that rises from step to step, and return how the loss went.

    ```python
    curve = find_learning_rate(trainer, loader)
    ```

    The rate rises by a constant factor and is that of all groups of the optimizer. The search ends
    early where the loss, over several ranks that of all of them, is five times its lowest.
    Afterwards model, loss and optimizer have their old values, the random generators stand where
    they stood, and so does a loader with `state_dict`. None of the trainer's handlers is called, so
    nothing is clipped, saved or logged.

    Source: Smith 2015, arXiv:1506.01186. Ignite's `FastaiLRFinder` makes its first update with the
    optimizer's own rate, and every other one with the rate that it lists one place later.

    Args:
        trainer: between two runs; its model, loss, optimizer, task, step and settings are used.
        loader: batches to train on.
        start: the first rate, > 0.
        end: the last rate, > start.
        steps: updates, >= 3; where there are fewer batches, the loader is run through again.

    Raises:
        ValueError: if an argument is out of range.
    """
    if not 0 < start < end or not math.isfinite(end):
        raise ValueError(f"start and end must be rates with 0 < start < end, got {start} and {end}")
    if steps < 3:
        raise ValueError(f"steps must be >= 3, got {steps}")
    place = loader.state_dict() if hasattr(loader, "state_dict") else None
    try:
        with preserved_random_state():
            return _search(trainer, loader, start, end, steps)
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        if place is not None and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(place)


class _Search:
    """Raises the rate before each update, and looks at the loss behind it."""

    def __init__(self, trainer: Trainer, start: float, end: float, steps: int) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._start, self._factor = start, (end / start) ** (1 / (steps - 1))
        self._mean = self._lowest = math.inf
        trainer.add_event_handler(Events.ITERATION_STARTED, self._raise)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._look)

    def _raise(self, trainer: Trainer) -> None:
        self.rates.append(self._start * self._factor ** len(self.rates))
        for group in trainer.optimizer.param_groups:
            rate = group["lr"]
            # A compiled or captured optimizer keeps its rate in a tensor.
            group["lr"] = (
                rate.new_tensor(self.rates[-1]) if isinstance(rate, Tensor) else self.rates[-1]
            )

    def _look(self, trainer: Trainer) -> None:
        output: Any = trainer.state.output
        value = float(sum_over_ranks(output.loss)) / world_size()  # all ranks end together
        if math.isfinite(self._mean):
            value = SMOOTHING * self._mean + (1 - SMOOTHING) * value
        self._mean = value
        self.losses.append(value)
        self._lowest = min(self._lowest, value)
        if not value <= DIVERGED * self._lowest:  # NaN is not
            trainer.terminate()


def _search(
    trainer: Trainer, loader: Iterable[Any], start: float, end: float, steps: int
) -> LearningRateCurve:
    bare = _without_handlers(trainer)
    parts: list[Any] = [bare.model, bare.loss, bare.optimizer]
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    search = _Search(bare, start, end, steps)
    try:
        bare.run(loader, max_epochs=1, epoch_length=steps)
    finally:
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    return LearningRateCurve(search.rates, search.losses, _suggestion(search.rates, search.losses))


def _without_handlers(trainer: Trainer) -> Trainer:
    """Return a trainer of the same parts, to whose events nobody listens."""
    settings = trainer.settings
    return Trainer(
        trainer.model,
        trainer.loss,
        trainer.optimizer,
        task=trainer.task,
        precision=settings.precision,
        microbatch_size=settings.microbatch_size,
        device=trainer.device,
        seed=settings.seed,
        shard=settings.shard,
        step=trainer.step,
    )


def _suggestion(rates: list[float], losses: list[float]) -> float | None:
    """Return the rate of the steepest fall before the lowest loss."""
    lowest = min(range(len(losses)), key=lambda i: math.inf if math.isnan(losses[i]) else losses[i])
    falls = {index: losses[index + 1] - losses[index - 1] for index in range(1, lowest)}
    steepest = min(falls, key=falls.__getitem__, default=None)
    return None if steepest is None or falls[steepest] >= 0 else rates[steepest]
