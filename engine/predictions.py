"""Predictions and targets for Ignite's metrics, `y_pred` and `y`, from a task's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.metrics import Metric, MetricsLambda
from torch import Tensor

from diptych.engine.containers import held_of
from diptych.engine.errors import UnknownNameError
from diptych.engine.tasks import NO_LABEL, Outputs

NAMES = ("y_pred", "y")
"""The names under which Ignite's metrics look for predictions and targets."""

CRITERION_KWARGS = "criterion_kwargs"
"""What `ignite.metrics.Loss` passes to its function too: nothing, unless the task returns it."""

Prediction = tuple[Tensor, Tensor]


def predict_labels(outputs: Mapping[str, Tensor]) -> Prediction:
    """Return `logits` and `labels`, the prediction of a task that declares no other."""
    return outputs["logits"], outputs["labels"]


class NamedOutputs(dict[str, Tensor]):
    """A task's outputs, which Ignite's metrics can also ask for `y_pred` and `y`.

    Both leave out the samples (and tokens) whose label is -100, which have none.

    A task may declare a method `prediction` that returns both from its outputs; `None` instead of
    the method says that it has none. A task that declares nothing predicts `logits` for `labels`.
    """

    def __init__(self, outputs: Mapping[str, Tensor], task: object) -> None:
        super().__init__(outputs)
        self._prediction = prediction_of(task)
        self._labelled: Prediction | None = None

    def __contains__(self, name: object) -> bool:
        named = name in NAMES and self.has_prediction
        return super().__contains__(name) or named or name == CRITERION_KWARGS

    def __missing__(self, name: str) -> Any:
        if name in NAMES and self._prediction is not None:
            if self._labelled is None:
                self._labelled = _labelled(*self._prediction(self))
            return self._labelled[NAMES.index(name)]
        if name == CRITERION_KWARGS:
            return {}
        raise UnknownNameError(
            f"output_transform must read outputs of the task, which are {', '.join(self)}, got "
            f"{name!r}"
        )

    @property
    def has_prediction(self) -> bool:
        """Whether the outputs hold what the prediction is made of."""
        if self._prediction is predict_labels:
            return {"logits", "labels"} <= set(self)
        return self._prediction is not None


def prediction_of(task: object) -> Callable[[Outputs], Prediction] | None:
    """Return the function from a task's outputs to `y_pred` and `y`; None: the task has none."""
    declared: Callable[[Outputs], Prediction] | None = getattr(task, "prediction", predict_labels)
    return declared


def _labelled(y_pred: Tensor, y: Tensor) -> Prediction:
    """Return predictions and targets without those that have no label."""
    dims = y_pred.ndim - y.ndim
    if y.is_floating_point() or y.dtype == torch.bool or dims not in {0, 1}:
        return y_pred, y
    known = y.long() != NO_LABEL  # 156 == -100 in uint8
    if bool(known.all()):
        return y_pred, y
    return (y_pred.movedim(1, -1) if dims else y_pred)[known], y[known]


def metrics_without_prediction(
    metrics: Mapping[str, Metric], outputs: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Return the names of the metrics that need `y_pred` and `y`, if the outputs lack them.

    Args:
        metrics: by name.
        outputs: the task's outputs; None if the task is known to predict nothing.
    """
    if outputs is not None and all(name in outputs for name in NAMES):
        return []
    return [
        name for name, metric in metrics.items() if any(map(_predicts, held_of(Metric, metric)))
    ]


def _predicts(metric: Metric) -> bool:
    """Return whether a metric takes `y_pred` and `y` from outputs that no function transforms."""
    if isinstance(metric, MetricsLambda) or not set(NAMES) & set(metric.required_output_keys or ()):
        return False
    given = object()
    try:
        return metric._output_transform(given) is given  # noqa: SLF001 - Ignite has no other way
    except Exception:  # noqa: BLE001 - a function of the user, which expects outputs
        return False
