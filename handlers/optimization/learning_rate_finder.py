"""Learning-rate range test: a short training with a rising rate, which is then undone."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import attrs
from ignite.engine import Events
from torch import Tensor

from diptych._summaries import Summarized
from diptych.engine.data.loader_contract import has_position
from diptych.engine.distributed.collectives import all_reduce_sum, world_size
from diptych.engine.random_state import preserved_random_state
from diptych.engine.state.references import other_optimizers
from diptych.engine.trainer import Trainer
from diptych.handlers.reports.curves import draw_chart, svg

SMOOTHING = 0.8
"""Weight of the previous value in the running mean of losses."""

DIVERGED = 5.0
"""Ratio to the lowest loss at which the search ends."""


@attrs.frozen(repr=False)
class LearningRateCurve(Summarized):
    """Result of a learning-rate search; a notebook shows it as a chart.

    Attributes:
        rates: the learning rate of each update, rising.
        losses: the running mean of the batch losses before each update.
        suggestion: the rate at which the loss falls fastest, or None if it never falls.
    """

    _shown = ("updates", "start", "end", "suggestion")

    rates: list[float]
    losses: list[float]
    suggestion: float | None

    @property
    def updates(self) -> int:
        """The number of updates before the search ended."""
        return len(self.rates)

    @property
    def start(self) -> float:
        """The first rate."""
        return self.rates[0]

    @property
    def end(self) -> float:
        """The last rate: that of the end, or at which the loss diverged."""
        return self.rates[-1]

    def _repr_html_(self) -> str:
        title = f"loss; learning rate {self.start:.1e} to {self.end:.1e}, in equal ratios"
        chart = svg(draw_chart(title, {"loss": list(enumerate(self.losses))}))
        return f'{super()._repr_html_()}<div style="max-width:480px">{chart}</div>'


def find_learning_rate(
    trainer: Trainer,
    loader: Iterable[Any],
    *,
    start: float = 1e-6,
    end: float = 1.0,
    steps: int = 100,
) -> LearningRateCurve:
    """Train for a few steps with a rising learning rate; return the losses and a suggestion.

    ```python
    curve = find_learning_rate(trainer, loader)
    ```

    The rate rises by a constant factor and applies to all groups of the optimizer. The search ends
    early if the loss, averaged over ranks, exceeds five times its lowest value. It trains with the
    trainer's settings, task, transform and step, and without its handlers: nothing is clipped,
    saved or logged. Afterwards the states of model, loss, optimizer, random generators and of a
    loader with `state_dict` are restored.

    Source: Smith 2015, arXiv:1506.01186. Ignite's `FastaiLRFinder` makes its first update with the
    optimizer's own rate, and lists each of its rates one update too early.

    Args:
        trainer: a trainer that is not running.
        loader: batches to train on.
        start: the first rate, > 0.
        end: the last rate, > start.
        steps: updates, >= 3; a loader with fewer batches is repeated.

    Raises:
        ValueError: if an argument is out of range, or the trainer's functions or its step use an
            optimizer of their own, which would not be searched.
    """
    if not 0 < start < end or not math.isfinite(end):
        raise ValueError(f"start and end must be rates with 0 < start < end, got {start} and {end}")
    if steps < 3:
        raise ValueError(f"steps must be >= 3, got {steps}")
    others = ", ".join(type(one).__name__ for one in other_optimizers(trainer))
    if others:
        raise ValueError(
            "trainer must have all of its parameters in one optimizer for a search, got another, "
            f"{others}, at an event or in the step, whose rate would not rise. Hold both in a "
            "CompositeOptimizer, or search before the function is added"
        )
    parts: list[Any] = [trainer.model, trainer.loss, trainer.optimizer]
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    if has_position(loader):
        parts.append(loader)
        states.append(loader.state_dict())
    search = _RisingRate(start, (end / start) ** (1 / (steps - 1)))
    try:
        with preserved_random_state():
            trainer.replica([search]).run(loader, max_epochs=1, epoch_length=steps)
    finally:
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        trainer.optimizer.zero_grad(set_to_none=True)
    return LearningRateCurve(search.rates, search.losses, _suggestion(search.rates, search.losses))


@attrs.define(eq=False)
class _RisingRate:
    """Sets the rate before each update, and records the loss after it."""

    start: float
    factor: float
    rates: list[float] = attrs.field(factory=list, init=False)
    losses: list[float] = attrs.field(factory=list, init=False)

    def attach(self, trainer: Trainer) -> None:
        """Set the rates of the trainer's optimizer, and watch its losses."""
        trainer.add_event_handler(Events.ITERATION_STARTED, self._set_rate)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._record)

    def _set_rate(self, trainer: Trainer) -> None:
        rate = self.start * self.factor ** len(self.rates)
        for group in trainer.optimizer.param_groups:
            given = group["lr"]
            # A new tensor, because the given one may be the caller's and must keep its value.
            group["lr"] = given.new_tensor(rate) if isinstance(given, Tensor) else rate
        self.rates.append(rate)

    def _record(self, trainer: Trainer) -> None:
        output: Any = trainer.state.output
        # The mean over ranks, so that all ranks stop at the same update.
        value = float(all_reduce_sum(output.loss)) / world_size()
        if self.losses and math.isfinite(self.losses[-1]):
            value = SMOOTHING * self.losses[-1] + (1 - SMOOTHING) * value
        self.losses.append(value)
        lowest = min((loss for loss in self.losses if not math.isnan(loss)), default=math.inf)
        if not value <= DIVERGED * lowest:  # true for NaN too
            trainer.terminate()


def _suggestion(rates: list[float], losses: list[float]) -> float | None:
    """Return the rate at which the loss falls fastest, before its minimum."""
    lowest = min(range(len(losses)), key=lambda i: math.inf if math.isnan(losses[i]) else losses[i])
    falls = {index: losses[index + 1] - losses[index - 1] for index in range(1, lowest)}
    steepest = min(falls, key=falls.__getitem__, default=None)
    return None if steepest is None or falls[steepest] >= 0 else rates[steepest]
