"""Linear probes: a head fitted to a bank of features, and a head trained beside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import attrs
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.exceptions import NotComputableError
from torch import Tensor

from diptych.engine.distributed.collectives import all_reduce_sum
from diptych.engine.distributed.gathering import gather_values
from diptych.engine.errors import BatchError
from diptych.engine.events import MetricsEvents, StepEvents
from diptych.engine.handler import Handler
from diptych.engine.tasks import NO_LABEL, Key, look_up, names_of
from diptych.engine.trainer import Trainer
from diptych.handlers.evaluation.known_ids import KnownIds
from diptych.handlers.evaluation.label_accuracy import Average
from diptych.handlers.evaluation.outputs_metric import OutputTransform, check_ids, unchanged
from diptych.handlers.evaluation.probes import ROWS, BankProbe


class LinearProbeAccuracy(BankProbe):
    """The accuracy of multinomial logistic regression on frozen features.

    The head minimises the mean cross entropy over the bank plus l2 / 2 times its squared weights
    (the bias is not penalised). L-BFGS starts at zero; each feature dimension is standardised over
    the bank. No random number is drawn: equal features give an equal head.

    Source: Radford et al. 2021, arXiv:2103.00020, section 3.2.

    Event: Ignite's for metrics; the bank is encoded when an epoch of its evaluator starts.
    Cost: a forward pass over the bank, of which each rank keeps its shard in float32; then about
        `iterations` passes over it, each two products with the head, in blocks of rows.

    Args:
        bank: as for every probe with a bank.
        l2: >= 0. Increase it if the features have so many dimensions that they fit any labels.
        iterations: the most iterations of L-BFGS, >= 1.
        top: as in `ClassificationAccuracy`.
        average: as in `ClassificationAccuracy`.
        output_transform: from the evaluator's output to a mapping with `features` and `labels`.

    Raises:
        ValueError: if an argument is out of range.
        BatchError: while running: if an output does not fit.
    """

    def __init__(
        self,
        bank: Iterable[Any] | None = None,
        *,
        l2: float = 1e-3,
        iterations: int = 200,
        top: int = 1,
        average: Average = "samples",
        output_transform: OutputTransform = unchanged,
    ) -> None:
        if not l2 >= 0:
            raise ValueError(f"l2 must be >= 0, got {l2!r}")
        if iterations < 1:
            raise ValueError(f"iterations must be >= 1, got {iterations!r}")
        self.l2, self.iterations = l2, iterations
        self._head: Tensor | None = None
        super().__init__(bank, top=top, average=average, output_transform=output_transform)

    @torch.no_grad()
    def fit(self) -> None:
        """Fit the head to the bank of all ranks, which take the same steps."""
        features, labels = self._local_bank()
        highest = int(labels.max()) if len(labels) else -1
        dims, highs = zip(*gather_values((features.shape[1], highest)), strict=True)
        dim = max(dims)
        if max(highs) < 0:
            raise NotComputableError(
                "LinearProbeAccuracy needs a bank with at least one labelled sample"
            )
        features = features.reshape(len(labels), dim)
        count = features.new_full((1,), len(labels), dtype=torch.float64)
        sums = all_reduce_sum(torch.cat([count, features.sum(0).double()]))
        self._mean = (sums[1:] / sums[0]).float()
        squares = all_reduce_sum((features - self._mean).square().sum(0).double()) / sums[0]
        self._scale = torch.where(squares > 1e-12, squares.rsqrt(), 0).float()
        self._head = self._minimise(features, labels, max(highs) + 1, float(sums[0]))
        self._features, self._labels = [], []

    def _minimise(self, features: Tensor, labels: Tensor, classes: int, count: float) -> Tensor:
        head = features.new_zeros(features.shape[1] + 1, classes)
        optimizer = torch.optim.LBFGS(
            [head],
            max_iter=self.iterations,
            tolerance_grad=1e-6,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            # The gradient is one more product: autograd would store every block's logits.
            loss, head.grad = self._loss_and_gradient(head, features, labels, count)
            return loss

        optimizer.step(closure)
        head.grad = None
        return head

    def _loss_and_gradient(
        self, head: Tensor, features: Tensor, labels: Tensor, count: float
    ) -> tuple[Tensor, Tensor]:
        loss, gradient = head.new_zeros(1, dtype=torch.float64), torch.zeros_like(head)
        for rows, own in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            inputs = self._inputs(rows)
            log_probabilities = F.log_softmax(inputs @ head, dim=1)
            loss -= log_probabilities.gather(1, own[:, None]).double().sum()
            gradient += inputs.T @ (log_probabilities.exp() - F.one_hot(own, head.shape[1]))
        sums = all_reduce_sum(torch.cat([loss, gradient.reshape(-1).double()])) / count
        weights = head.clone()
        weights[-1] = 0
        total = sums[0] + self.l2 / 2 * weights.double().square().sum()
        return total.float(), sums[1:].view_as(head).float() + self.l2 * weights

    def _inputs(self, features: Tensor) -> Tensor:
        """Return the standardised features and a column of ones, [B, D + 1]."""
        return F.pad((features - self._mean) * self._scale, (0, 1), value=1.0)

    def scores(self, features: Tensor) -> Tensor:
        """Return the logits."""
        if self._head is None:
            raise NotComputableError("LinearProbeAccuracy must fit its bank before it predicts")
        return self._inputs(features) @ self._head


@attrs.define(kw_only=True, eq=False)
class OnlineLinearProbe(Handler):
    """Trains a linear head on detached features during training and publishes its accuracy.

    ```python
    OnlineLinearProbe(classes=9, labels=lambda batch: categories[batch["group"]])
    ```

    Before each update of the model, the head is scored on the unit features of the batch, times
    sqrt(D), and then takes one step of Adam on their cross entropy. It does not change the run: its
    weights start at zero without a random number, the features are detached, and it has its own
    optimizer. `train/linear_probe_accuracy` and `train/linear_probe_loss` are computed before the
    head learns from the batch. They are optimistic from the second epoch on, since model and head
    have seen the samples: use `LinearProbeAccuracy` for held-out samples. Both are means over the
    labelled samples of all ranks, and so is the loss of the head.

    Event: `StepEvents.LOSS_COMPUTED`; `StepEvents.OPTIMIZER_STEPPED` for its update;
        `MetricsEvents.LOGGED` to report labels that are no class.
    Cost: three products of the batch and the head per iteration; no synchronisation but at the
        first batch and at log points. In a process group, one all-reduce of the head's gradient.

    Args:
        classes: number of classes, >= 2.
        labels: the key of integer labels [B] in the batch (in a tuple, a name means its last
            element), or a function of the batch that returns them. -100 means no label: the sample
            counts nowhere. Neither does one whose label is no class, which is logged as an error,
            nor one with NaN or infinite features.
        features: the name of the task's output to probe; None: the first that ends in "_features".
        lr: Adam's learning rate for the head, > 0.

    Raises:
        ValueError: if an argument is out of range.
        BatchError: while running: if the outputs lack the features, the batch lacks labels, or they
            do not fit together.
    """

    collective: ClassVar[bool] = True

    classes: int = attrs.field(validator=attrs.validators.ge(2))
    labels: Key | Callable[[Any], Tensor] = "label"
    features: str | None = None
    lr: float = attrs.field(default=1e-2, validator=attrs.validators.gt(0))
    head: torch.nn.Linear | None = attrs.field(default=None, init=False)
    _known: KnownIds = attrs.field(init=False, repr=False)
    _optimizer: torch.optim.Adam = attrs.field(init=False, repr=False)
    _device: torch.device | None = attrs.field(default=None, init=False, repr=False)
    _is_measured: bool = attrs.field(default=False, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._known = KnownIds("labels", self.classes)

    @property
    def role(self) -> str:
        """The features, if they are named."""
        return self.features or ""

    def attach(self, trainer: Trainer) -> None:
        """Train the head on the outputs of each of the trainer's batches."""
        self._device = trainer.device
        trainer.add_event_handler(StepEvents.LOSS_COMPUTED, self._measure)
        # After the update, so that a step which is repeated after an exception counts once. A step
        # of the user's own may lack the first event.
        trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, self._learn)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._learn)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._report)

    def state_dict(self) -> dict[str, Any]:
        """Return the head and its optimizer's state; empty before the first batch."""
        if self.head is None:
            return {}
        return {"head": self.head.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue with a head that `state_dict` returned."""
        self.head = None
        if state_dict:
            head = self._new_head(state_dict["head"]["weight"].shape[1])
            head.load_state_dict(state_dict["head"])
            self._optimizer.load_state_dict(state_dict["optimizer"])

    def _new_head(self, dim: int) -> torch.nn.Linear:
        # Skip the random initialization: it would draw from the run's generator.
        head: torch.nn.Linear = torch.nn.utils.skip_init(
            torch.nn.Linear, dim, self.classes, device=self._device
        )
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
        self.head, self._optimizer = head, torch.optim.Adam(head.parameters(), lr=self.lr)
        return head

    def _report(self, _: Trainer) -> None:
        self._known.report(type(self).__name__)

    def _learn(self, _: Engine) -> None:
        if self._is_measured:
            self._optimizer.step()
        self._is_measured = False

    def _measure(self, trainer: Trainer) -> None:
        features = self._features_of(trainer)
        labels = self._labels_of(trainer, features)
        is_first = self.head is None
        head = self.head or self._new_head(features.shape[1])
        inputs = F.normalize(features.float(), dim=1) * features.shape[1] ** 0.5
        # The head would stay NaN, even if a guard skips the model's update.
        finite = inputs.isfinite().all(1)
        logits = head(inputs.masked_fill(~finite[:, None], 0))
        known = self._known.mask(labels) & finite
        if is_first:
            self._report(trainer)
        loss = F.cross_entropy(logits, labels.masked_fill(~known, NO_LABEL), reduction="sum")
        seen = known.sum().to(loss)
        # The mean over the labelled samples of all ranks, however they are distributed.
        parameters = [*head.parameters()]
        gradients = torch.autograd.grad(loss, parameters)
        sums = all_reduce_sum(torch.cat([seen[None], *(one.flatten() for one in gradients)]))
        means = (sums[1:] / sums[0].clamp(min=1)).split([p.numel() for p in parameters])
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.grad = mean.view_as(parameter)
        self._is_measured = True
        correct = ((logits.detach().argmax(1) == labels) & known).sum().to(seen)
        trainer.metrics.update_sums(
            {
                "train/linear_probe_loss": loss.detach(),
                "train/linear_probe_accuracy": correct,
            },
            seen,
        )

    def _features_of(self, trainer: Trainer) -> Tensor:
        outputs = trainer.outputs
        names = (name for name in outputs if name.endswith("_features"))
        name = next(names, None) if self.features is None else self.features
        if name not in outputs or outputs[name].ndim != 2:
            wanted = "an output that ends in '_features'" if name is None else repr(name)
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in outputs.items())
            raise BatchError(
                f"features must be one of the task's outputs, of shape [B, D], got {wanted} among "
                f"{shapes}. Name one with features="
            )
        return outputs[name]

    def _labels_of(self, trainer: Trainer, features: Tensor) -> Tensor:
        batch = trainer.state.batch
        labels = self.labels(batch) if callable(self.labels) else look_up(batch, self.labels, -1)
        if labels is None:
            raise BatchError(
                f"labels must be a key of the batch, got {self.labels!r} among {names_of(batch)}. "
                "Pass a key, or a function of the batch, with labels="
            )
        check_ids("labels", labels, len(features))
        return labels.to(features.device, torch.int64, non_blocking=True)
