"""Runs an evaluator on a cadence and publishes its values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import attrs
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from torch import Tensor, nn

from diptych.engine.containers import leaves
from diptych.engine.data.batches import batch_size
from diptych.engine.distributed.collectives import sum_over_ranks, world_size
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.distributed.gathering import from_all_ranks
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import BatchError
from diptych.engine.evaluator import Evaluator, Metrics, evaluation_mode
from diptych.engine.events import EvaluationEvents
from diptych.engine.settings import AUTOCAST, Precision
from diptych.engine.step.loss_contract import SampleMeanLoss
from diptych.engine.tasks import Outputs, Task
from diptych.engine.trainer import Trainer
from diptych.handlers.cadence import call_every, check_every

Weights = Literal["average", "model"]


@runtime_checkable
class AveragesWeights(Protocol):
    """A handler that keeps an average of the weights."""

    def averaged(self) -> AbstractContextManager[object]:
        """Return a context in which the trainer's model holds the average; restored afterwards."""
        ...


def _check_weights(_: Any, __: attrs.Attribute[str], weights: object) -> None:
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be 'average' or 'model', got {weights!r}")


def _check_loader(_: Any, __: attrs.Attribute[Any], loader: object) -> None:
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise TypeError(
            "loader must be something that can be iterated again for each evaluation, got "
            f"{type(loader).__name__}"
        )


def _check_prefix(_: Any, __: attrs.Attribute[str], prefix: str) -> None:
    if not prefix or prefix != prefix.strip("/") or prefix == "train":
        raise ValueError(
            f"prefix must be a name such as 'val', and not 'train', got {prefix!r}: values are "
            "published as prefix/name"
        )


@attrs.define(eq=False)
class Evaluation:
    """Evaluates the model while it trains, and publishes the values as `val/...`.

    ```python
    Evaluation(loader, metrics=[RetrievalRecall(k=(1, 5, 10))], every="epoch")
    Evaluation(unseen, metrics=[RetrievalRecall()], every=500, prefix="unseen", at_start=True)
    ```

    Each value goes, as prefix/name, into `trainer.state.metrics`, into the metrics' history, and to
    every sink; then `EvaluationEvents.EVALUATED` fires. One of them is `val/loss`: the trainer's
    loss, its mean over the loader's batches weighted by their sizes; a contrastive loss depends on
    the size of the batch, so compare it between loaders of one batch size only. Model and loss are
    in eval mode (a queue takes nothing in) and random generators stand still meanwhile: the run
    goes on as if nothing had happened.

    Where the trainer has a handler that averages its weights (`WeightAverage`), the average is
    evaluated, and the weights of the run are put back bit for bit; `weights="model"` leaves them.

    Over several ranks every rank evaluates what its own loader gives, and the values are those of
    all: give the loader a sampler that shards it without padding. A loss that couples the samples
    of a batch sees the batches of all ranks together, of which there must be as many on each.

    Event: `Events.EPOCH_COMPLETED` or, with a number, `Events.ITERATION_COMPLETED`, and
        `Events.STARTED` with `at_start`.
    Cost: a forward pass over the loader and what the metrics cost, while training waits; nothing
        between two evaluations.

    Args:
        loader: batches, the same each time it is iterated.
        metrics: Ignite metrics, in a sequence or by name; see `Evaluator`.
        every: "epoch", or iterations between two evaluations.
        prefix: what the names of the values begin with; each evaluation of a trainer has its own.
        task: what a batch means; None: the trainer's task.
        model: what to evaluate, another model say; None: the trainer's model.
        weights: "average": the average of the trainer's weights, where a handler keeps one;
            "model": the weights as they are, and the only choice for a model of one's own.
        at_start: whether to evaluate before a run's first iteration too, as iteration 0.
        loss: whether to publish the loss. Default: with the trainer's own task.

    Attributes:
        evaluator: the `Evaluator`, once attached; Ignite's handlers attach to it too.
        values: what was published last, by name; empty before.

    Raises:
        TypeError: if the loader can be iterated once only (a generator), or a metric is none.
        ValueError: if an argument is out of range; when attached, if another evaluation of the
            trainer has this prefix, or a metric is called "loss" beside the loss; while running, if
            several handlers average the weights.
        BatchError: while running: if ranks have different numbers of batches for a loss that
            couples them, or two ranks begin with the same batch.
    """

    loader: Iterable[Any] = attrs.field(validator=_check_loader)
    metrics: Metrics = attrs.field(default=(), kw_only=True)
    every: int | Literal["epoch"] = attrs.field(
        default="epoch", validator=check_every, kw_only=True
    )
    prefix: str = attrs.field(default="val", validator=_check_prefix, kw_only=True)
    task: Task | None = attrs.field(default=None, kw_only=True)
    model: nn.Module | None = attrs.field(default=None, kw_only=True)
    weights: Weights = attrs.field(default="average", validator=_check_weights, kw_only=True)
    at_start: bool = attrs.field(default=False, kw_only=True)
    loss: bool = attrs.field(kw_only=True)
    evaluator: Evaluator = attrs.field(init=False, repr=False)
    values: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)
    _validation_loss: ValidationLoss | None = attrs.field(default=None, init=False, repr=False)

    @loss.default
    def _with_own_task(self) -> bool:
        return self.task is None

    def attach(self, trainer: Trainer) -> None:
        """Evaluate on the trainer's events."""
        for other in trainer.handlers:
            if isinstance(other, Evaluation) and other.prefix == self.prefix:
                raise ValueError(
                    f"each Evaluation needs a prefix of its own, got {self.prefix!r} twice"
                )
        self.evaluator = Evaluator(
            trainer.model if self.model is None else self.model,
            task=trainer.task if self.task is None else self.task,
            metrics=self.metrics,
            precision=trainer.settings.precision,
            device=trainer.device,
        )
        if self.loss:
            self._check_names()
            self._validation_loss = ValidationLoss(
                trainer.loss, trainer.settings.precision, trainer.device
            )
            self._validation_loss.attach(self.evaluator, "loss")
        if world_size() > 1:
            self.evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=1), _check_own_share)
        if self.at_start:
            trainer.add_event_handler(Events.STARTED, self._evaluate_at_start)
        call_every(trainer, self.every, self.evaluate)

    @waits_at("sharing an evaluation")
    def evaluate(self, trainer: Trainer) -> dict[str, float]:
        """Evaluate now, publish the values and return them by name."""
        # Another task or loss may have taken the place of the trainer's: that of a stage.
        self.evaluator.task = trainer.task if self.task is None else self.task
        if self._validation_loss is not None:
            self._validation_loss.loss = trainer.loss
        if has_shards(trainer.model) or (self.loss and couples_samples(trainer.loss)):
            _check_same_length(self.loader)
        with evaluation_mode(trainer.loss), self._weights(trainer):
            values = self.evaluator.evaluate(self.loader)
        if self.loss:
            values["loss"] = self.evaluator.state.metrics["loss"]
        self.values = {f"{self.prefix}/{name}": value for name, value in values.items()}
        trainer.state.metrics.update(self.values)
        trainer.metrics.report(trainer.state.iteration, self.values)
        trainer.fire_event(EvaluationEvents.EVALUATED)
        return self.values

    @property
    def scores_averages(self) -> bool:
        """Whether the trainer's averaged weights are evaluated, where a handler keeps some."""
        return self.weights == "average" and self.model is None

    def _weights(self, trainer: Trainer) -> AbstractContextManager[object]:
        averages = _averages(trainer) if self.scores_averages else []
        if len(averages) > 1:
            raise ValueError(
                "one handler may average the weights that are evaluated, got "
                f"{len(averages)}: give Evaluation weights='model', or attach one"
            )
        return averages[0].averaged() if averages else nullcontext()

    def _evaluate_at_start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0:
            self.evaluate(trainer)

    def _check_names(self) -> None:
        if isinstance(self.metrics, Mapping):
            names = list(self.metrics)
        else:
            names = [type(metric).__name__.lower() for metric in self.metrics]
        if "loss" in names:
            raise ValueError(
                "a metric must not be called 'loss', which is the trainer's loss, got "
                f"{', '.join(names)}: name it in a mapping, or give loss=False"
            )


def average_scored(trainer: Trainer, metric: str) -> AveragesWeights | None:
    """Return the handler whose averaged weights a metric is a score of; None: the model's own."""
    scored = any(
        isinstance(h, Evaluation) and metric.startswith(f"{h.prefix}/") and h.scores_averages
        for h in trainer.handlers
    )
    return next(iter(_averages(trainer)), None) if scored else None


def _averages(trainer: Trainer) -> list[AveragesWeights]:
    return [handler for handler in trainer.handlers if isinstance(handler, AveragesWeights)]


class ValidationLoss(Metric):
    """The mean of a loss over an evaluator's batches; the task's outputs are its arguments.

    A loss that couples samples is weighted by batch size. A mean over samples (one that has
    `total_and_weight`) is that of all samples together.

    Event: Ignite's for metrics.
    Cost: the loss of each batch, without a synchronisation until the end.

    Args:
        loss: taken in the mode that it is in.
        precision: of the autocast around it.
        device: where it computes.

    Attributes:
        loss: what was given as `loss`. Another may take its place between two evaluations.
    """

    def __init__(self, loss: nn.Module, precision: Precision, device: torch.device) -> None:
        self.loss = loss
        self._dtype = AUTOCAST.get(precision)
        super().__init__(device=device)

    def reset(self) -> None:
        """Forget what was seen."""
        self._totals: list[Tensor] = []
        self._weights: list[Tensor] = []

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Take the output of an evaluator's iteration."""
        self.update(cast(Outputs, engine.state.output))

    @torch.no_grad()
    def update(self, output: Outputs) -> None:
        """Add a batch.

        Args:
            output: the task's tensors, in the order in which the loss takes them.
        """
        dtype = self._dtype
        with nullcontext() if dtype is None else torch.autocast(self._device.type, dtype=dtype):
            total, weight = self._total_and_weight(output)
        self._totals.append(total.detach().double())
        self._weights.append(weight.detach().double())

    def _total_and_weight(self, output: Outputs) -> tuple[Tensor, Tensor]:
        if isinstance(self.loss, SampleMeanLoss) and not couples_samples(self.loss):
            return self.loss.total_and_weight(*output.values())
        value = self.loss(*output.values())
        size = torch.full_like(value, batch_size(output), dtype=torch.float64)
        return (value if couples_samples(self.loss) else value * size), size

    def compute(self) -> float:
        """Return the mean over all batches of all ranks; 0 where nothing has a weight."""
        totals, weights = torch.stack(self._totals), torch.stack(self._weights)
        if couples_samples(self.loss):
            # Each rank's value is its share of the global batch's loss, their mean.
            weights = sum_over_ranks(weights)
            totals = sum_over_ranks(totals) / world_size() * weights
            total, weight = totals.sum(), weights.sum()
        else:
            total, weight = sum_over_ranks(torch.stack([totals.sum(), weights.sum()])).unbind()
        return float(torch.where(weight > 0, total / weight, total))


def couples_samples(loss: nn.Module) -> bool:
    """Say whether a loss of a batch is no mean over samples, and gathers those of all ranks."""
    return bool(getattr(loss, "couples_samples", False))


def _check_same_length(loader: Iterable[Any]) -> None:
    """Raise where ranks would wait for one another's batches for ever."""
    if world_size() == 1:
        return
    lengths = from_all_ranks(len(loader) if isinstance(loader, Sized) else None)
    if len(set(lengths)) > 1:
        raise BatchError(
            "a sharded model, and a loss that couples samples, need as many batches on every rank, "
            f"got {lengths}: share the loader evenly, or, for the loss, give loss=False"
        )


def _check_own_share(evaluator: Engine) -> None:
    """Raise, on all ranks, where two of them evaluate the same samples as if they were others."""
    tensors = [leaf for leaf in leaves(evaluator.state.batch) if isinstance(leaf, Tensor)]
    seen = from_all_ranks([_digest(tensor) for tensor in tensors])
    first = next((i for i, digest in enumerate(seen) if digest in seen[:i]), None)
    if first is not None:
        raise BatchError(
            "each rank must evaluate samples of its own, got the same first batch on ranks "
            f"{seen.index(seen[first])} and {first}: give the loader a sampler that shards it, or "
            "the batches to of_this_rank"
        )


def _digest(values: Tensor) -> tuple[tuple[int, ...], float]:
    """Return the shape of a tensor, and a sum that tells its values and their places."""
    flat = values.detach().flatten().double()
    place = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device)
    return tuple(values.shape), float(flat @ place.sqrt())
