"""Linear probes: a linear head on frozen features, fitted at an evaluation or while training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from ignite.exceptions import NotComputableError
from torch import Tensor

from diptych.engine.distributed.collectives import sum_over_ranks, world_size
from diptych.engine.distributed.gathering import from_all_ranks
from diptych.engine.errors import BatchError
from diptych.engine.events import StepEvents
from diptych.engine.tasks import Key, look_up, names_of
from diptych.engine.trainer import Trainer
from diptych.handlers.evaluation.probes import ROWS, BankProbe, Outputs


class LinearProbeAccuracy(BankProbe):
    """The accuracy of multinomial logistic regression on frozen features.

    The head minimises the mean cross entropy over the bank and l2 / 2 times its squared weights
    (its bias is free), by L-BFGS from zero on features whose dimensions are standardised over the
    bank. No random number is drawn: equal features give an equal head.

    Source: Radford et al. 2021, arXiv:2103.00020, section 3.2.

    Event: Ignite's for metrics; the bank is encoded when an epoch of its evaluator starts.
    Cost: a forward pass over the bank, which is kept in float32, each rank its shard; then some
        `iterations` passes over it, each two products with the head, in blocks of rows.

    Args:
        bank: as for every probe with a bank.
        l2: >= 0; with features in so many dimensions that any labels can be fitted, more of it
            helps.
        iterations: of L-BFGS at most, >= 1.
        output_transform: from the evaluator's output to a mapping with `features` and `labels`.

    Raises:
        ValueError: if an argument is out of range.
        BatchError: while running: if a label of the bank is negative, or an output does not fit.
    """

    def __init__(
        self,
        bank: Iterable[Any] | None = None,
        *,
        l2: float = 1e-3,
        iterations: int = 200,
        output_transform: Callable[[Any], Outputs] = lambda output: output,
    ) -> None:
        if not l2 >= 0:
            raise ValueError(f"l2 must be >= 0, got {l2!r}")
        if iterations < 1:
            raise ValueError(f"iterations must be >= 1, got {iterations!r}")
        self.l2, self.iterations = l2, iterations
        self._head: Tensor | None = None
        super().__init__(bank, output_transform=output_transform)

    @torch.no_grad()
    def fit(self) -> None:
        """Fit the head to the bank of all ranks; they take the same steps."""
        features, labels = self._bank_of_this_rank()
        dim = max(from_all_ranks(features.shape[1]))
        if dim == 0:
            raise NotComputableError("LinearProbeAccuracy needs a bank with at least one sample")
        features = features.reshape(len(labels), dim)
        ends = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        lows, highs = zip(*from_all_ranks(ends), strict=True)
        if min(lows) < 0:
            raise BatchError(f"labels must be >= 0, got {min(lows)}")
        count = features.new_full((1,), len(labels), dtype=torch.float64)
        sums = sum_over_ranks(torch.cat([count, features.sum(0).double()]))
        self._mean = (sums[1:] / sums[0]).float()
        squares = sum_over_ranks((features - self._mean).square().sum(0).double()) / sums[0]
        self._scale = torch.where(squares > 1e-12, squares.rsqrt(), 0).float()
        self._head = features.new_zeros(dim + 1, max(highs) + 1)
        self._minimise(features, labels, float(sums[0]))
        self._features, self._labels = [], []

    def _minimise(self, features: Tensor, labels: Tensor, count: float) -> None:
        head = self._head
        assert head is not None
        optimizer = torch.optim.LBFGS(
            [head],
            max_iter=self.iterations,
            tolerance_grad=1e-6,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            loss, gradient = self._loss_and_gradient(head, features, labels, count)
            head.grad = gradient
            return loss

        # A closure without autograd: the gradient is one more product.
        optimizer.step(closure)
        head.grad = None

    def _loss_and_gradient(
        self, head: Tensor, features: Tensor, labels: Tensor, count: float
    ) -> tuple[Tensor, Tensor]:
        loss, gradient = head.new_zeros(1, dtype=torch.float64), torch.zeros_like(head)
        for rows, own in zip(features.split(ROWS), labels.split(ROWS), strict=True):
            inputs = self._inputs(rows)
            log_shares = F.log_softmax(inputs @ head, dim=1)
            loss -= log_shares.gather(1, own[:, None]).double().sum()
            gradient += inputs.T @ (log_shares.exp() - F.one_hot(own, head.shape[1]))
        sums = sum_over_ranks(torch.cat([loss, gradient.reshape(-1).double()])) / count
        weights = head.clone()
        weights[-1] = 0
        total = sums[0] + self.l2 / 2 * weights.double().square().sum()
        return total.float(), sums[1:].view_as(head).float() + self.l2 * weights

    def _inputs(self, features: Tensor) -> Tensor:
        """Return standardised features and a column of ones, [B, D + 1]."""
        standard = (features - self._mean) * self._scale
        return F.pad(standard, (0, 1), value=1.0)

    def predict(self, features: Tensor) -> Tensor:
        """Return the class of the largest logit."""
        if self._head is None:
            raise NotComputableError("LinearProbeAccuracy must fit its bank before it predicts")
        return (self._inputs(features) @ self._head).argmax(1)


@attrs.define(kw_only=True, eq=False)
class OnlineLinearProbe:
    """Trains a linear head on detached features while the model trains, and publishes its accuracy.

    ```python
    OnlineLinearProbe(classes=9, labels=lambda batch: categories[batch["group"]])
    ```

    The head sees the unit features of each batch, times sqrt(D), before the model's update, is
    scored, and then takes one step of Adam on their cross entropy. Its weights start at zero and
    nothing is drawn, the features are detached, and the head has an optimizer of its own: no number
    of the run changes. `train/linear_probe_accuracy` and `train/linear_probe_loss` are those of
    each batch before the head learns from it. They flatter where epochs repeat, since model and
    head have seen the samples: `LinearProbeAccuracy` asks for others.

    Event: `StepEvents.LOSS_COMPUTED`.
    Cost: three products of the batch and the head an iteration; no synchronisation. Over ranks, one
        sum of the head's gradient.

    Args:
        classes: number of classes, >= 2.
        labels: the key of integer labels [B] in the batch (of a tuple, a name means its last part),
            or a function of the batch that returns them; -100 stands for none.
        features: the name of the task's output to probe; None: the first that ends in "_features".
        lr: Adam's rate for the head, > 0.

    Raises:
        ValueError: if an argument is out of range.
        BatchError: while running: if the outputs lack the features, the batch lacks labels, or they
            do not fit together.
    """

    classes: int = attrs.field(validator=attrs.validators.ge(2))
    labels: Key | Callable[[Any], Tensor] = "label"
    features: str | None = None
    lr: float = attrs.field(default=1e-2, validator=attrs.validators.gt(0))
    head: torch.nn.Linear | None = attrs.field(default=None, init=False)
    _optimizer: torch.optim.Adam = attrs.field(init=False, repr=False)
    _device: torch.device | None = attrs.field(default=None, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Train the head on the outputs of each of the trainer's batches."""
        self._device = trainer.device
        trainer.add_event_handler(StepEvents.LOSS_COMPUTED, self._step)

    def state_dict(self) -> dict[str, Any]:
        """Return the head and its optimizer's state."""
        if self.head is None:
            return {}
        return {"head": self.head.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with a head that `state_dict` returned."""
        self.head = None
        if state_dict:
            self._start(state_dict["head"]["weight"].shape[1])
            assert self.head is not None
            self.head.load_state_dict(state_dict["head"])
            self._optimizer.load_state_dict(state_dict["optimizer"])

    def _start(self, dim: int) -> None:
        # Without its random initialization: the generator is the run's.
        head = torch.nn.utils.skip_init(torch.nn.Linear, dim, self.classes, device=self._device)
        self.head = head
        for parameter in self.head.parameters():
            torch.nn.init.zeros_(parameter)
        self._optimizer = torch.optim.Adam(self.head.parameters(), lr=self.lr)

    def _step(self, trainer: Trainer) -> None:
        features = self._features_of(trainer)
        labels = self._labels_of(trainer, features)
        if self.head is None:
            self._start(features.shape[1])
        assert self.head is not None
        logits = self.head(F.normalize(features.float(), dim=1) * features.shape[1] ** 0.5)
        counted = labels >= 0
        seen = counted.sum().clamp(min=1)
        loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / seen
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.head.parameters():
            if parameter.grad is not None:
                parameter.grad = sum_over_ranks(parameter.grad) / world_size()
        self._optimizer.step()
        right = ((logits.detach().argmax(1) == labels) & counted).sum()
        trainer.metrics.update(
            {
                "train/linear_probe_loss": loss.detach(),
                "train/linear_probe_accuracy": right / seen,
            }
        )

    def _features_of(self, trainer: Trainer) -> Tensor:
        outputs = trainer.outputs
        names = (name for name in outputs if name.endswith("_features"))
        name = next(names, None) if self.features is None else self.features
        if name not in outputs or outputs[name].ndim != 2:
            wanted = "a [B, D] output that ends in '_features'" if name is None else repr(name)
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in outputs.items())
            raise BatchError(
                f"the linear probe needs {wanted} among the task's outputs, got {shapes}: name one "
                "of shape [B, D] with features="
            )
        return outputs[name]

    def _labels_of(self, trainer: Trainer, features: Tensor) -> Tensor:
        batch = trainer.state.batch
        labels = self.labels(batch) if callable(self.labels) else look_up(batch, self.labels, -1)
        if not isinstance(labels, Tensor):
            raise BatchError(
                f"the batch must have labels under {self.labels!r}, got {names_of(batch)}: give "
                "their key, or a function of the batch, with labels="
            )
        if labels.shape != features.shape[:1] or labels.is_floating_point():
            raise BatchError(
                f"labels must be integers [{len(features)}], got {labels.dtype} "
                f"{tuple(labels.shape)}"
            )
        return labels.to(features.device, torch.int64, non_blocking=True)
