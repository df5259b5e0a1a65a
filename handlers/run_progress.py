"""How far a run has come: what a handler that saves or judges it needs to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diptych.handlers.evaluation.evaluation import Evaluation

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer


def moment(trainer: Trainer) -> tuple[int, int]:
    """Return iteration and place in the epoch: the last iteration ends before its epoch does."""
    return trainer.state.iteration, trainer.epoch_iteration


def place_is_lost(trainer: Trainer) -> bool:
    """Say whether the run stands inside an epoch of a loader that cannot go there again."""
    return bool(trainer.epoch_iteration) and not trainer.batches.has_positions


def where_it_resumes(trainer: Trainer, *, epochs_only: bool) -> str | None:
    """Return what follows for resuming from a loader without positions, if anything does.

    Args:
        trainer: whose run starts.
        epochs_only: whether it is saved at the ends of epochs alone.
    """
    data, epoch = trainer.state.dataloader, trainer.state.epoch_length
    if trainer.batches.has_positions or data is None:
        return None
    length = trainer.batches.pass_length
    told = f"{type(data).__name__} cannot go to a position, so the run can be resumed"
    if epoch is not None and (length is None or epoch % length):
        batches = f"of {length} batches" if length else "whose length it does not tell"
        return f"{told} only where an epoch of {epoch} iterations ends with a pass {batches}"
    return None if epochs_only else f"{told} at the end of each epoch only"


def published(trainer: Trainer, metric: str) -> list[float]:
    """Return all values of a metric so far, none where it has no name in the run yet."""
    try:
        return trainer.metrics.get_history(metric)
    except KeyError:
        return []


def unpublished(trainer: Trainer, argument: str, metric: str) -> str | None:
    """Return what to say where a metric should have had a value by now, at a safe point.

    That is at the end of the first epoch; where an evaluation of its prefix is attached, with that
    evaluation's first values; at the latest at the end of the run.

    Args:
        trainer: whose run.
        argument: the name under which a handler was given the metric.
        metric: the name under which its values are published.
    """
    if published(trainer, metric):
        return None
    own = [
        handler
        for handler in trainer.handlers
        if isinstance(handler, Evaluation) and metric.startswith(f"{handler.prefix}/")
    ]
    to_come = not all(evaluation.values for evaluation in own) if own else trainer.epoch_iteration
    if to_come and not trainer.is_finished:
        return None
    there = ", ".join(sorted(trainer.state.metrics)) or "none"
    return (
        f"{argument} must be a metric that the run publishes, by the end of its first epoch or by "
        f"its first evaluation, got {metric!r}; there are {there}"
    )
