"""Metrics that a handler watches: their values, the weights they score, the error if missing."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection

from ignite.metrics import Metric

from diptych.engine.containers import held_of
from diptych.engine.distributed.collectives import rank
from diptych.engine.errors import UnknownNameError
from diptych.engine.evaluator import named_metrics
from diptych.engine.trainer import Trainer
from diptych.handlers.evaluation.evaluation import AveragesWeights, Evaluation

logger = logging.getLogger(__name__)


def published_values(trainer: Trainer, metric: str) -> list[float]:
    """Return all values of a metric so far; none if nothing of that name was published."""
    try:
        return trainer.metrics.get_history(metric)
    except KeyError:
        return []


def report_nan(handler: str, metric: str, value: float, iteration: int) -> None:
    """Log, on rank 0, that a value of a metric is NaN, and what the handler makes of it."""
    if math.isnan(value) and rank() == 0:
        logger.warning(
            "%s is NaN after iteration %d: %s counts it as no improvement. LossGuard() finds the "
            "first such batch.",
            metric,
            iteration,
            handler,
        )


def average_behind(trainer: Trainer, metric: str) -> AveragesWeights | None:
    """Return the handler whose average a metric scores; None: it scores the model's own weights."""
    scored = any(evaluation.scores_averages for evaluation in _publishers(trainer, metric))
    return next(iter(trainer.handlers_of(AveragesWeights)), None) if scored else None


def is_evaluated(trainer: Trainer, metric: str) -> bool:
    """Return whether an attached evaluation has the prefix of a metric."""
    return bool(_publishers(trainer, metric))


def check_published(trainer: Trainer, metric: str) -> None:
    """Raise a `KeyError` if the metric of a handler should have had a value by now."""
    missing = missing_metric(trainer, "metric", metric)
    if missing is not None:
        raise UnknownNameError(missing)


def missing_metric(trainer: Trainer, argument: str, metric: str) -> str | None:
    """Return an error message if a metric should have had a value by now, else None.

    Call it at a safe point. A value is expected at the end of the first epoch; if evaluations of
    the metric's prefix are attached, with their first values; at the latest at the end of the run,
    unless the run ends inside its first epoch, as a trial of a few iterations does.
    """
    if published_values(trainer, metric) or trainer.leaves_out:
        return None
    evaluations = _publishers(trainer, metric)
    if evaluations:
        is_due = all(evaluation.values for evaluation in evaluations)
    else:
        is_due = not trainer.epoch_iteration
    # What is due at a run's end inside an epoch follows its last safe point.
    is_cut = trainer.position.cut and trainer.state.epoch > 1
    has_ended = trainer.is_finished and (is_cut or not trainer.epoch_iteration)
    if not is_due and not has_ended:
        return None
    return _message(argument, metric, trainer.state.metrics)


def check_name(
    trainer: Trainer, argument: str, metric: str, error: type[Exception] = UnknownNameError
) -> None:
    """Raise an error if it is known, when a run starts, that nothing publishes a metric.

    It is known for the prefix of an attached evaluation, for `val`, for `val_loss`, as others spell
    it, and for an evaluation's metric without its prefix, if only this library's objects listen to
    the run: a function of the user may publish under any name.
    """
    if trainer.leaves_out or _has_foreign_publishers(trainer):
        return
    if names := _names_of_first_batches(trainer, metric):
        raise error(_message(argument, metric, {"train/loss", *names}))


def _names_of_first_batches(trainer: Trainer, metric: str) -> set[str]:
    """Return the names that are there instead of a metric; none if it may be published."""
    evaluations, every = _publishers(trainer, metric), trainer.handlers_of(Evaluation)
    if evaluations or metric.startswith(("val/", "val_")):
        return _first_names(trainer, evaluations or every, metric)
    if "/" in metric:
        return set()
    names = _first_names(trainer, every, metric)
    return names if any(name.endswith(f"/{metric}") for name in names - {"train/loss"}) else set()


def _first_names(trainer: Trainer, evaluations: list[Evaluation], metric: str) -> set[str]:
    names = {"train/loss"}
    for evaluation in evaluations:
        found = evaluation.check(trainer) if evaluation.check_first_batch else None
        if found is None or metric in found:
            return set()
        names |= found
    return names


def _message(argument: str, metric: str, there: Collection[str]) -> str:
    if metric in there:
        return (
            f"{argument} must be a number that the run publishes, got {metric!r}, which is in "
            "trainer.state.metrics alone. Publish it with trainer.metrics.update"
        )
    return (
        f"{argument} must be a metric that the run publishes by the end of its first epoch or with "
        f"its first evaluation, got {metric!r}; there are {', '.join(sorted(there)) or 'none'}"
    )


def _has_foreign_publishers(trainer: Trainer) -> bool:
    """Return whether code from outside of the library may publish values, as far as can be told."""
    evaluations = trainer.handlers_of(Evaluation)
    metrics = [metric for one in evaluations for metric in named_metrics(one.metrics).values()]
    known = {id(part) for metric in metrics for part in held_of(Metric, metric)}
    engines = (trainer, *(evaluation.evaluator for evaluation in evaluations))
    owners = [listener.owner for engine in engines for listener in engine.listeners]
    others = [owner for owner in owners if id(owner) not in known]
    return trainer.step is not None or not all(map(_is_of_the_library, others))


def _is_of_the_library(owner: object) -> bool:
    definition = owner if hasattr(owner, "__module__") else type(owner)
    return str(definition.__module__).startswith("diptych.")


def _publishers(trainer: Trainer, metric: str) -> list[Evaluation]:
    """Return the evaluations that publish values under a metric's prefix."""
    evaluations = trainer.handlers_of(Evaluation)
    return [evaluation for evaluation in evaluations if metric.startswith(f"{evaluation.prefix}/")]
