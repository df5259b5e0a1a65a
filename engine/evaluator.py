"""The evaluator: a model in eval mode, without gradients, and Ignite metrics over a loader."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from ignite import distributed as idist
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from torch import Tensor, nn

from diptych._summaries import Summarized
from diptych.engine.checks import numbers_in
from diptych.engine.data.batches import to_device
from diptych.engine.data.loader_contract import length_of
from diptych.engine.distributed.agreement import wait_for_all_ranks
from diptych.engine.distributed.collectives import world_size
from diptych.engine.distributed.dtensor import call_on, has_shards
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import BatchError, ResumeError
from diptych.engine.forward_faults import raise_likely_cause
from diptych.engine.loop.dispatcher import Dispatcher
from diptych.engine.loop.event_loop import EventLoop
from diptych.engine.predictions import NamedOutputs, metrics_without_prediction, prediction_of
from diptych.engine.random_state import preserved_random_state
from diptych.engine.settings import AUTOCAST, Precision, TrainerSettings
from diptych.engine.tasks import Outputs, Task, check_not_logits, check_outputs

SHARED = ("diptych.", "ignite.")
"""The packages whose metrics are computed over all ranks."""
Metrics = Sequence[Metric] | Mapping[str, Metric]


class Evaluator(Summarized, EventLoop):
    """Runs a task over a loader and returns the values of metrics.

    An Ignite engine whose output is the task's named tensors. The model is in eval mode during the
    evaluation; afterwards every module has its earlier mode, and random generators their earlier
    state.

    Args:
        model: the model to evaluate; moved to the device.
        task: maps model and batch to named tensors.
        metrics: Ignite metrics, by name or in a sequence. A metric that computes a dictionary
            brings its own names; any other in a sequence has the name of its class (`Accuracy` is
            `accuracy`). Each takes the task's outputs through its `output_transform`.
        precision: fp32, bf16 or fp16 autocast.
        device: the device to evaluate on; None: this process's accelerator, else the CPU.
        partial: whether loaders hold only the beginning of the data, for a trial: a metric that
            cannot be computed from it is left out, and probes do not read their banks.

    Attributes:
        left_out: in a trial, the names of the metrics that were not computed, with the reasons.

    Raises:
        TypeError: if a metric is not an Ignite metric.
        ValueError: if two metrics have one name, or one needs predictions that the task lacks.
    """

    _shown = ("model", "task", "_metrics", "device")

    def __init__(
        self,
        model: nn.Module,
        *,
        task: Task,
        metrics: Metrics = (),
        precision: Precision = "fp32",
        device: torch.device | str | None = None,
        partial: bool = False,
    ) -> None:
        super().__init__(self._evaluate_batch)
        self.partial = partial
        self.left_out: dict[str, str] = {}
        settings = TrainerSettings(precision=precision, device=device)
        self.device = settings.device or idist.device()
        self.model = model if has_shards(model) else model.to(self.device)
        self.task = task
        self._autocast_dtype = AUTOCAST.get(precision)
        self._metrics = named_metrics(metrics)
        if prediction_of(task) is None:
            _check_needs_no_prediction(self._metrics, task)
        for name, metric in self._metrics.items():
            metric.attach(self, name)
            if partial and self.has_event_handler(metric.completed, Events.EPOCH_COMPLETED):
                self.remove_event_handler(metric.completed, Events.EPOCH_COMPLETED)
                self.add_event_handler(Events.EPOCH_COMPLETED, self._try_to_compute, metric, name)

    @property
    def chance(self) -> dict[str, float]:
        """The values of random features, of metrics that know them, by name; after `evaluate`."""
        # Ignite's metrics answer any name with a function, so getattr would find one.
        known = [vars(metric).get("chance", {}) for metric in self._metrics.values()]
        return {name: value for values in known for name, value in values.items()}

    @waits_at("sharing an evaluation")
    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Return the value of every metric over one pass of `loader`.

        Raises:
            BatchError: if the loader is empty, or the task's outputs do not fit a metric.
            RuntimeError: if a handler terminated the evaluation.
        """
        empty = "loader must have at least one batch, got an empty loader"
        if length_of(loader) == 0:
            raise BatchError(empty)
        if any(type(metric).__module__.startswith(SHARED) for metric in self._metrics.values()):
            wait_for_all_ranks("an evaluation")
        state = self.state
        state.max_epochs = state.max_iters = None
        state.metrics = {}
        with preserved_random_state(), evaluation_mode(self.model):
            try:
                self.run(loader, max_epochs=1)
            except ResumeError as error:
                raise BatchError(empty) from error
        if self.position.in_epoch or not state.epoch:
            raise RuntimeError(
                f"an evaluation must reach the end of its loader, but stopped after "
                f"{state.iteration} batches. Call terminate_epoch() to end it early with the "
                "values so far"
            )
        return self._values()

    def outputs(self, batch: Any) -> Outputs:
        """Return the task's outputs for one batch, in eval precision and without gradients.

        Args:
            batch: from a loader; moved to the device.
        """
        dtype = self._autocast_dtype
        autocast = nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)
        batch = to_device(batch, self.device)
        with torch.no_grad(), autocast:
            try:
                return call_on(self.task, self.model, batch)
            except Exception as error:
                raise_likely_cause(error, self.model, batch)
                raise

    def _evaluate_batch(self, _: Engine, batch: Any) -> Outputs:
        outputs = self.outputs(batch)
        check_outputs(outputs)
        named = NamedOutputs(outputs, self.task)
        if self.state.iteration == 1:
            check_not_logits(outputs)
            _check_needs_no_prediction(self._metrics, self.task, named)
        return named

    def _try_to_compute(self, _: Engine, metric: Metric, name: str) -> None:
        if world_size() > 1:  # a rank that fails alone would leave the others waiting
            self.left_out[name] = "several ranks compute it together"
            return
        try:
            metric.completed(self, name)
        except Exception as error:  # noqa: BLE001 - a few batches need not have every class or group
            self.left_out[name] = str(error)

    def _values(self) -> dict[str, float]:
        """Return the numbers among the results."""
        values: dict[str, Any] = {}
        for name in [name for name in self._metrics if name not in self.left_out]:
            result = self.state.metrics[name]
            given = result if isinstance(result, Mapping) else {name: result}
            _check_names([*values, *given])
            values.update(given)
        return numbers_in(values)


@runtime_checkable
class EvaluatesModel(Protocol):
    """A handler that runs an evaluator and publishes its values under a prefix."""

    prefix: str
    evaluator: Evaluator


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Put modules into eval mode; afterwards each submodule has its earlier mode again."""
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part in training:
            part.training = True


def named_metrics(metrics: Metrics) -> dict[str, Metric]:
    """Return metrics by their names; those of a sequence have the names of their classes."""
    if isinstance(metrics, (Metric, str)) or not isinstance(metrics, Iterable):
        # Ignite's metrics accept any index, so iterating one would never end.
        raise TypeError(
            "metrics must be a sequence or a mapping of metrics, got a "
            f"{type(metrics).__name__}. Pass metrics=[...]"
        )
    if isinstance(metrics, Mapping):
        named = list(metrics.items())
    else:
        named = [(_snake_case(type(metric).__name__), metric) for metric in metrics]
    for _, metric in named:
        if not isinstance(metric, Metric):
            way_out = "RetrievalRecall(k=(1, 5)) is one, for example"
            if isinstance(metric, type):
                way_out = f"Make an instance: {metric.__name__}()"
            got = metric if isinstance(metric, (str, type)) else f"a {type(metric).__name__}"
            raise TypeError(f"a metric must be an ignite.metrics.Metric, got {got}. {way_out}")
    _check_names([name for name, _ in named])
    return dict(named)


def _check_names(names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"metrics must have different names, got {', '.join(repeated)} twice. Pass a mapping"
        )


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def computed_by_metrics(engine: Dispatcher) -> dict[str, float]:
    """Return the numbers that Ignite's metrics, attached to an engine, computed for an epoch."""
    at_end = (one for one in engine.listeners if one.event == Events.EPOCH_COMPLETED)
    # `Metric.completed` has an argument, the name; a metric that is updated here has none.
    of_metrics = [one for one in at_end if isinstance(one.owner, Metric) and one.arguments]
    values: dict[str, float] = {}
    for name in (one.arguments[0] for one in of_metrics):
        result = engine.state.metrics.get(name)
        values |= numbers_in(result if isinstance(result, Mapping) else {name: result})
    return values


def _check_needs_no_prediction(
    metrics: Mapping[str, Metric], task: object, outputs: Mapping[str, Tensor] | None = None
) -> None:
    names = metrics_without_prediction(metrics, outputs)
    if names:
        name = getattr(task, "__name__", type(task).__name__)
        got = name if outputs is None else f"{', '.join(outputs) or 'nothing'} from {name}"
        raise BatchError(
            f"task must return logits and labels, or y_pred and y, for the metrics "
            f"{', '.join(names)}, got {got}. Give the evaluation a task that returns them, or the "
            "metric an output_transform from the outputs to (y_pred, y)"
        )
