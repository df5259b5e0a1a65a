"""Metrics that a handler watches: their values, the weights they score, the error if missing."""

from __future__ import annotations

from diptych.engine.trainer import Trainer
from diptych.handlers.evaluation.evaluation import AveragesWeights, Evaluation


def published_values(trainer: Trainer, metric: str) -> list[float]:
    """Return all values of a metric so far; none if nothing of that name was published."""
    try:
        return trainer.metrics.get_history(metric)
    except KeyError:
        return []


def average_behind(trainer: Trainer, metric: str) -> AveragesWeights | None:
    """Return the handler whose average a metric scores; None: it scores the model's own weights."""
    scored = any(evaluation.scores_averages for evaluation in _publishers(trainer, metric))
    return next(iter(trainer.handlers_of(AveragesWeights)), None) if scored else None


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
    evaluations = _publishers(trainer, metric)
    if evaluations:
        is_due = all(evaluation.values for evaluation in evaluations)
    else:
        is_due = not trainer.epoch_iteration
    # What is due at a run's end inside an epoch follows its last safe point.
    has_ended = trainer.is_finished and (trainer.position.cut or not trainer.epoch_iteration)
    if not is_due and not has_ended:
        return None
    there = ", ".join(sorted(trainer.state.metrics)) or "none"
    return (
        f"{argument} must be a metric that the run publishes by the end of its first epoch or with "
        f"its first evaluation, got {metric!r}; there are {there}"
    )


def _publishers(trainer: Trainer, metric: str) -> list[Evaluation]:
    """Return the evaluations that publish values under a metric's prefix."""
    evaluations = trainer.handlers_of(Evaluation)
    return [evaluation for evaluation in evaluations if metric.startswith(f"{evaluation.prefix}/")]
