"""Evaluation of averaged weights: who keeps an average, and which metrics score it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from diptych.engine.trainer import Trainer


@runtime_checkable
class AveragesWeights(Protocol):
    """A handler that keeps an average of the model's weights, such as `WeightAverage`."""

    def averaged(self) -> AbstractContextManager[object]:
        """Return a context in which the model holds the average; it restores the weights."""
        ...


@runtime_checkable
class ScoresAverages(Protocol):
    """A handler that publishes scores of the averaged weights, such as `Evaluation`.

    Attributes:
        prefix: the first part of its metrics' names.
    """

    prefix: str

    @property
    def scores_averages(self) -> bool:
        """Whether it evaluates the average if a handler keeps one."""
        ...


def average_behind(trainer: Trainer, metric: str) -> AveragesWeights | None:
    """Return the handler whose average a metric scores; None: it scores the model's own weights."""
    scored = any(
        metric.startswith(f"{handler.prefix}/") and handler.scores_averages
        for handler in trainer.handlers_of(ScoresAverages)
    )
    return next(iter(trainer.handlers_of(AveragesWeights)), None) if scored else None
