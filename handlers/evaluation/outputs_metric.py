"""The base class of metrics on a task's named outputs, and the checks of these outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from torch import Tensor

from diptych._argument_names import names_the_right_arguments_of
from diptych.engine.errors import BatchError

Outputs = Mapping[str, Tensor]
OutputTransform = Callable[[Any], Outputs]


def unchanged(output: Any) -> Any:
    """Return an evaluator's output as it is; the default `output_transform`."""
    return output


class OutputsMetric(Metric):
    """An Ignite metric whose `update` takes a mapping of named tensors.

    Ignite's own `iteration_completed` passes a tuple of required outputs instead, and iterates over
    lists.
    """

    required_output_keys = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        names_the_right_arguments_of(cls)

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Update the metric with the output of an evaluator's iteration."""
        self.update(self._output_transform(engine.state.output))

    @abstractmethod
    def update(self, output: Outputs) -> None:
        """Add a batch."""


def check_features(features: Tensor) -> None:
    """Check that features are a matrix, a row for each sample.

    Raises:
        BatchError: if they are not.
    """
    if features.ndim != 2:
        raise BatchError(f"features must be [B, D], got shape {tuple(features.shape)}")


def check_ids(name: str, ids: object, rows: int) -> None:
    """Check that labels or groups are integers, one for each row of the features.

    Raises:
        BatchError: if they are not.
    """
    if not isinstance(ids, Tensor) or ids.shape != (rows,) or ids.is_floating_point():
        got = f"a {type(ids).__name__}"
        if isinstance(ids, Tensor):
            got = f"{ids.dtype} {tuple(ids.shape)}"
        raise BatchError(f"{name} must be a tensor of integers [{rows}], got {got}")
