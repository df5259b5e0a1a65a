"""Evaluation during training: an evaluator on a cadence, and the validation loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import attrs
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from diptych._loss_arguments import call_with
from diptych.engine.checks import numbers_in
from diptych.engine.containers import leaves
from diptych.engine.data.batches import batch_size
from diptych.engine.data.loader_contract import check_is_loader, length_of
from diptych.engine.distributed.agreement import wait_for_all_ranks
from diptych.engine.distributed.collectives import all_reduce_sum, rank, world_size
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.distributed.gathering import gather_values
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import BatchError
from diptych.engine.evaluator import (
    SHARED,
    Evaluator,
    Metrics,
    evaluation_mode,
    named_metrics,
)
from diptych.engine.events import EvaluationEvents
from diptych.engine.handler import Handler
from diptych.engine.optimizers.optimizer_modes import evaluation_weights
from diptych.engine.settings import AUTOCAST, Precision
from diptych.engine.step import loss_contract
from diptych.engine.step.batch_checks import report_last_batch
from diptych.engine.step.loss_contract import loss_terms, sample_mean_of, sum_of_terms
from diptych.engine.tasks import Task
from diptych.engine.trainer import Trainer
from diptych.engine.trials.first_batches import first_batches
from diptych.engine.trials.restored import buffers_restored, metrics_restored
from diptych.engine.trials.trial import Trial
from diptych.handlers.argument_checks import one_of
from diptych.handlers.cadence import call_before_first_batch, call_every, check_every
from diptych.handlers.evaluation.outputs_metric import Outputs, OutputsMetric

logger = logging.getLogger(__name__)

Weights = Literal["average", "model"]


@runtime_checkable
class AveragesWeights(Protocol):
    """A handler that keeps an average of the model's weights, such as `WeightAverage`."""

    def averaged(self) -> AbstractContextManager[object]:
        """Return a context in which the model holds the average; it restores the weights."""


def _check_loader(_: Any, __: attrs.Attribute[Any], loader: object) -> None:
    check_is_loader("loader", loader)
    if isinstance(loader, Iterator):
        raise TypeError(
            "loader must be an object that can be iterated again for each evaluation, got "
            f"{type(loader).__name__}. Pass a DataLoader or a list of batches"
        )


def _has_data_of(loader: object, other: object) -> bool:
    data = getattr(loader, "dataset", None)
    return loader is other or (data is not None and data is getattr(other, "dataset", None))


def _check_prefix(_: Any, __: attrs.Attribute[str], prefix: str) -> None:
    if not prefix or prefix != prefix.strip("/") or prefix == "train":
        raise ValueError(
            f"prefix must be a name such as 'val', and not 'train', got {prefix!r}. Values are "
            "published as prefix/name"
        )


@attrs.define(eq=False)
class Evaluation(Handler):
    """Evaluates the model during training and publishes the values as `val/...`.

    ```python
    Evaluation(loader, metrics=[RetrievalRecall(k=(1, 5, 10))], every="epoch")
    Evaluation(unseen, metrics=[RetrievalRecall()], every=500, prefix="unseen", at_start=True)
    ```

    Each value goes, as prefix/name, into `trainer.state.metrics`, into the metrics' history and to
    every sink; then `EvaluationEvents.EVALUATED` fires. `val/loss` is the trainer's loss: its mean
    over the loader's batches, weighted by their sizes. A contrastive loss depends on the batch
    size, so compare it only between loaders of one batch size. Model and loss are in eval mode
    during an evaluation (a queue stores nothing), and random generators are left as they were: the
    evaluation does not change the run.

    If a handler averages the trainer's weights (`WeightAverage`), the average is evaluated, and the
    trained weights are restored bit for bit. `weights="model"` evaluates the trained weights. An
    optimizer with `train()` and `eval()` (a schedule-free one) is in evaluation mode meanwhile.

    In a process group, every rank evaluates the batches of its own loader, and the values are those
    of all ranks: use a sampler that shards without padding. If the loss couples the samples of a
    batch, it takes the batches of all ranks together, and every rank needs the same number of them.

    Event: `Events.EPOCH_COMPLETED` and `RunEvents.EPOCH_CUT` or, if `every` is a number,
        `Events.ITERATION_COMPLETED`; `Events.STARTED` with `at_start`; a run's first
        `Events.GET_BATCH_STARTED` to try the first batch.
        Fires `EvaluationEvents.BATCH_EVALUATED` and `EVALUATED`.
    Cost: a forward pass over the loader and the cost of the metrics, while training waits; nothing
        between two evaluations; one batch when a run starts.

    Args:
        loader: batches, the same each time it is iterated.
        metrics: Ignite metrics, in a sequence or by name; see `Evaluator`.
        every: "epoch", or iterations between two evaluations.
        prefix: the first part of the values' names; each evaluation of a trainer needs its own.
        task: a function from model and batch to named tensors; None: the trainer's task.
        model: a model to evaluate instead of the trainer's; None: the trainer's model.
        weights: "average": the average of the trainer's weights, if a handler keeps one; "model":
            the trained weights. Another `model` is always evaluated as it is.
        at_start: whether to evaluate before a run's first iteration too, as iteration 0.
        check_first_batch: whether to try the first batch when the run starts, so that an empty
            loader, a missing key or a metric that does not fit is reported before the first
            iteration.
        loss: whether to publish the loss. Default: True unless a `task` is given.

    Attributes:
        evaluator: the `Evaluator`, once attached; Ignite's handlers can be attached to it.
        values: the values of the last evaluation, by name; empty before the first.

    Raises:
        TypeError: if the loader can be iterated only once (a generator), or a metric is no Ignite
            metric.
        ValueError: if an argument is out of range; when attached, if another evaluation of the
            trainer has this prefix, or a metric is called "loss" beside the loss; while running, if
            several handlers average the weights.
        BatchError: when attached: if a metric needs predictions and the task returns features;
            when the run starts, and while running: if the loader is empty, task, loss and metrics
            do not fit its batches, ranks have different numbers of batches and the loss couples
            them, or two ranks begin with the same batch.
    """

    collective: ClassVar[bool] = True

    loader: Iterable[Any] = attrs.field(validator=_check_loader)
    metrics: Metrics = attrs.field(default=(), kw_only=True)
    every: int | Literal["epoch"] = attrs.field(
        default="epoch", validator=check_every, kw_only=True
    )
    prefix: str = attrs.field(default="val", validator=_check_prefix, kw_only=True)
    task: Task | None = attrs.field(default=None, kw_only=True)
    model: nn.Module | None = attrs.field(default=None, kw_only=True)
    weights: Weights = attrs.field(default="average", validator=one_of(Weights), kw_only=True)
    at_start: bool = attrs.field(default=False, kw_only=True)
    check_first_batch: bool = attrs.field(default=True, kw_only=True)
    loss: bool = attrs.field(kw_only=True)
    evaluator: Evaluator = attrs.field(init=False, repr=False)
    values: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)
    _validation_loss: ValidationLoss | None = attrs.field(default=None, init=False, repr=False)
    _common_batches: int | None = attrs.field(default=None, init=False, repr=False)
    is_trial: bool = attrs.field(default=False, init=False, repr=False)
    _checked: object = attrs.field(default=None, init=False, repr=False)
    _names: frozenset[str] | None = attrs.field(default=None, init=False, repr=False)

    @loss.default
    def _has_the_trainers_task(self) -> bool:
        return self.task is None

    @property
    def role(self) -> str:
        """The prefix."""
        return self.prefix

    @property
    def scores_averages(self) -> bool:
        """Whether the averaged weights are evaluated if a handler keeps an average."""
        return self.weights == "average" and self.model is None

    def attach(self, trainer: Trainer) -> None:
        """Evaluate on the trainer's events."""
        if any(other.prefix == self.prefix for other in trainer.handlers_of(Evaluation)):
            raise ValueError(
                f"prefix must be different for each Evaluation of a trainer, got {self.prefix!r} "
                "twice"
            )
        partial = self.is_trial
        self.evaluator, self._validation_loss = self._make_evaluator(trainer, partial=partial)
        if self.check_first_batch:
            call_before_first_batch(trainer, self._check_at_start)
        if self.at_start:
            trainer.add_event_handler(Events.STARTED, self._evaluate_at_start)
        call_every(trainer, self.every, self.evaluate)

    def for_trial(self, trial: Trial) -> Evaluation:
        """Return a copy that evaluates a few batches."""
        trial.contexts.enter_context(metrics_restored(named_metrics(self.metrics).values()))
        copied = trial.rebuilt(self, loader=first_batches(self.loader, trial.batches))
        copied.check_first_batch, copied.is_trial = False, True
        return copied

    def _make_evaluator(
        self, trainer: Trainer, *, partial: bool = False
    ) -> tuple[Evaluator, ValidationLoss | None]:
        evaluator = Evaluator(
            trainer.model if self.model is None else self.model,
            task=trainer.task if self.task is None else self.task,
            metrics=self.metrics,
            precision=trainer.settings.precision,
            device=trainer.device,
            partial=partial,
        )
        loss = None
        if self.loss:
            names = list(named_metrics(self.metrics))
            if "loss" in names:
                raise ValueError(
                    "metrics must not have the name 'loss', which is the trainer's loss, got "
                    f"{', '.join(names)}. Name it in a mapping, or pass loss=False"
                )
            loss = ValidationLoss(trainer.loss, trainer.settings.precision, trainer.device)
            loss.attach(evaluator, "loss")
        if world_size() > 1:
            evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=1), _check_shards)
        if not partial:
            evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._pass_on, trainer)
        return evaluator, loss

    def _pass_on(self, evaluator: Engine, trainer: Trainer) -> None:
        """Fire `BATCH_EVALUATED`, over ranks for the batches that all of them have."""
        if self._common_batches is None or evaluator.state.iteration <= self._common_batches:
            trainer.fire_event(EvaluationEvents.BATCH_EVALUATED)

    @waits_at("sharing an evaluation")
    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Evaluate now, publish the values and return them by name."""
        wait_for_all_ranks("an evaluation")
        # A stage may have replaced the trainer's task or loss since the last evaluation.
        self.evaluator.task = trainer.task if self.task is None else self.task
        loss = self._validation_loss
        if loss is not None:
            loss.loss = trainer.loss
        self._check_length(trainer)
        scored = self._weights(trainer)
        with evaluation_mode(trainer.loss), evaluation_weights(*trainer.optimizers), scored:
            self.evaluator.evaluate(self.loader)
        results = self.evaluator.state.metrics  # with those of metrics that a user has attached
        for name, result in results.items():
            if not isinstance(result, Mapping):  # its items are among the results
                trainer.state.metrics[f"{self.prefix}/{name}"] = result
        values = numbers_in(results)
        self.values = {f"{self.prefix}/{name}": value for name, value in values.items()}
        trainer.state.metrics.update(self.values)
        trainer.metrics.report(trainer.state.iteration, self.values)
        trainer.fire_and_report(EvaluationEvents.EVALUATED)
        return self.values

    @waits_at("checking an evaluation")
    def check(self, trainer: Trainer) -> frozenset[str] | None:
        """Evaluate the first batch, once, and return the names of the values; None: not known.

        Nothing is published, and everything is restored. Probes read one batch of their banks. The
        names of some metrics are known only after a whole evaluation.

        Raises:
            BatchError: if the loader is empty, or a batch lacks what task, loss or metrics need.
        """
        if self._checked is not self.loader:
            try:
                self._names = self._try_first_batch(trainer)
            except BatchError as error:
                raise BatchError(f"the first batch of {self.key}: {error}") from error
            except Exception as error:
                if hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(f"It was raised by the first batch of {self.key}, at the start.")
                raise
            self._checked = self.loader
        return self._names

    def _try_first_batch(self, trainer: Trainer) -> frozenset[str] | None:
        self._check_length(trainer)
        batches = first_batches(self.loader)
        modules = (self.evaluator.model, trainer.loss)
        metrics = named_metrics(self.metrics)
        with (
            metrics_restored(metrics.values()),
            buffers_restored(*modules),
            evaluation_mode(trainer.loss),
        ):
            evaluator, _ = self._make_evaluator(trainer, partial=True)
            evaluator.evaluate(batches)
        results = evaluator.state.metrics
        several = [metrics[name] for name in metrics if isinstance(results.get(name), Mapping)]
        # The names in the result of a user's metric may depend on the data: its classes.
        known = all(type(metric).__module__.startswith(SHARED) for metric in several)
        if evaluator.left_out or not known:
            return None
        return frozenset(f"{self.prefix}/{name}" for name in numbers_in(results))

    def _check_length(self, trainer: Trainer) -> None:
        """Raise on all ranks if one of them has no batch, or too few: others would wait for it."""
        if world_size() == 1:
            return
        lengths = gather_values(length_of(self.loader))
        if 0 in lengths:
            raise BatchError(f"loader must have a batch on every rank, got {lengths} batches")
        self._common_batches = min(length or 0 for length in lengths)  # 0 if one is unknown
        loss = self._validation_loss
        coupled = has_shards(trainer.model) or (loss is not None and loss.couples_samples)
        if coupled and len(set(lengths)) > 1:
            raise BatchError(
                "loader must have as many batches on every rank if the model is sharded or the "
                f"loss couples samples, got {lengths}. Shard it evenly or, because of the loss, "
                "pass loss=False"
            )

    def _check_at_start(self, trainer: Trainer) -> None:
        is_trained_on = _has_data_of(self.loader, trainer.state.dataloader)
        if is_trained_on and "train" not in self.prefix and rank() == 0:
            logger.warning(
                "%s reads the data that the run trains on. Give it held-out data, or name it: "
                "prefix='train_data'.",
                self.key,
            )
        if self.loss:
            report_last_batch(trainer.loss, self.loader, f"{self.prefix}/loss leaves it out")
        if not (self.at_start and trainer.state.iteration == 0):
            self.check(trainer)

    def _weights(self, trainer: Trainer) -> AbstractContextManager[object]:
        averages = trainer.handlers_of(AveragesWeights) if self.scores_averages else []
        if len(averages) > 1:
            raise ValueError(
                "handlers that average the weights must be at most one, got "
                f"{len(averages)}. Attach one, or give Evaluation weights='model'"
            )
        return averages[0].averaged() if averages else nullcontext()

    def _evaluate_at_start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0:
            self.evaluate(trainer)


class ValidationLoss(OutputsMetric):
    """The mean of a loss over an evaluator's batches; its arguments are the task's outputs.

    If the loss couples samples, batches are weighted by their sizes. If it is a mean over samples
    (it has `total_and_weight`), the value is the mean over all samples together. A loss that
    declares neither is treated as a mean over the samples of its batch. A batch that is too small
    for the loss (its `minimum_batch`) is left out.

    Event: Ignite's for metrics.
    Cost: the loss of each batch; no synchronisation until the end.

    Args:
        loss: used in the mode it is in.
        precision: of the autocast around it.
        device: of the sums.

    Attributes:
        loss: the loss; it can be replaced between two evaluations.
    """

    def __init__(self, loss: nn.Module, precision: Precision, device: torch.device) -> None:
        self.loss = loss
        self._dtype = AUTOCAST.get(precision)
        super().__init__(device=device)

    @property
    def couples_samples(self) -> bool:
        """Whether the loss takes the samples of all ranks together."""
        default = loss_contract.minimum_batch(self.loss) > 1
        return loss_contract.couples_samples(self.loss, default=default)

    def reset(self) -> None:
        """Forget the batches so far."""
        self._totals: list[Tensor] = []
        self._weights: list[Tensor] = []

    @torch.no_grad()
    def update(self, output: Outputs) -> None:
        """Add a batch: the task's tensors, in the order in which the loss takes them."""
        if loss_contract.is_too_small(self.loss, batch_size(output)):
            return
        dtype = self._dtype
        with nullcontext() if dtype is None else torch.autocast(self._device.type, dtype=dtype):
            total, weight = self._total_and_weight(output)
        self._totals.append(total.detach().double())
        self._weights.append(weight.detach().double())

    def _total_and_weight(self, output: Outputs) -> tuple[Tensor, Tensor]:
        mean = None if self.couples_samples else sample_mean_of(self.loss)
        if mean is not None:
            return call_with(mean.total_and_weight, output)
        value = sum_of_terms(loss_terms(self.loss, output))
        size = torch.full_like(value, batch_size(output), dtype=torch.float64)
        return (value if self.couples_samples else value * size), size

    def compute(self) -> float:
        """Return the mean over all batches of all ranks; 0 if their weights sum to 0.

        NaN if every batch was too small for the loss.
        """
        if not self._totals:
            return math.nan
        totals, weights = torch.stack(self._totals), torch.stack(self._weights)
        if self.couples_samples:
            # A rank's value is its share of the global batch's loss; the loss is their mean.
            weights = all_reduce_sum(weights)
            totals = all_reduce_sum(totals) / world_size() * weights
            total, weight = totals.sum(), weights.sum()
        else:
            total, weight = all_reduce_sum(torch.stack([totals.sum(), weights.sum()])).unbind()
        return float(torch.where(weight > 0, total / weight, total))


def _check_shards(evaluator: Engine) -> None:
    """Raise on all ranks if two of them evaluate the same samples."""
    tensors = [leaf for leaf in leaves(evaluator.state.batch) if isinstance(leaf, Tensor)]
    seen = gather_values([_digest(tensor) for tensor in tensors])
    first = next((i for i, digest in enumerate(seen) if digest in seen[:i]), None)
    if first is not None:
        raise BatchError(
            "loader must give each rank different samples, got the same first batch on ranks "
            f"{seen.index(seen[first])} and {first}. Use a sampler that shards, or wrap the "
            "batches in of_this_rank"
        )


def _digest(values: Tensor) -> tuple[tuple[int, ...], float]:
    """Return the shape of a tensor, and a sum that depends on its values and their order."""
    flat = values.detach().flatten().double()
    position = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device)
    return tuple(values.shape), float(flat @ position.sqrt())
