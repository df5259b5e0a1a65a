"""The values of a metric that a handler watches, and the error if nothing publishes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from diptych.engine.trainer import Trainer


@runtime_checkable
class PublishesValues(Protocol):
    """A handler that publishes metrics under a prefix, such as `Evaluation`.

    Attributes:
        prefix: the first part of its metrics' names.
        values: the values that it published last, by name; empty before the first.
    """

    prefix: str
    values: Mapping[str, float]


def published_values(trainer: Trainer, metric: str) -> list[float]:
    """Return all values of a metric so far; none if nothing of that name was published."""
    try:
        return trainer.metrics.get_history(metric)
    except KeyError:
        return []


def missing_metric(trainer: Trainer, argument: str, metric: str) -> str | None:
    """Return an error message if a metric should have had a value by now, else None.

    Call it at a safe point. A value is expected at the end of the first epoch; if evaluations of
    the metric's prefix are attached, with their first values; at the latest at the end of the run.

    Args:
        trainer: the trainer whose run it is.
        argument: the argument through which a handler was given the metric.
        metric: the name under which its values are published.
    """
    if published_values(trainer, metric):
        return None
    evaluations = [
        handler
        for handler in trainer.handlers_of(PublishesValues)
        if metric.startswith(f"{handler.prefix}/")
    ]
    if evaluations:
        is_due = all(evaluation.values for evaluation in evaluations)
    else:
        is_due = not trainer.epoch_iteration
    if not is_due and not trainer.is_finished:
        return None
    there = ", ".join(sorted(trainer.state.metrics)) or "none"
    return (
        f"{argument} must be a metric that the run publishes by the end of its first epoch or with "
        f"its first evaluation, got {metric!r}; there are {there}"
    )
