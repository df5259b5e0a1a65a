"""Copies of a training that make one update at a time, apart from the original."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from diptych.engine.containers import map_leaves
from diptych.engine.data.batches import split_batch, to_device
from diptych.engine.data.transform import Transform, apply_transform, placed_transform
from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.events import StepEvents
from diptych.engine.modules import unwrapped
from diptych.engine.random_state import preserved_random_state
from diptych.engine.step.loss_contract import loss_terms, sum_of_terms
from diptych.engine.step.microbatch import join_outputs
from diptych.engine.trainer import Trainer

Gradients = dict[str, Tensor]
FIXED = {"precision": "fp32", "compile": False, "seed": None, "shard": False}
"""Arguments of the trainer that are the same in every copy."""


@attrs.frozen
class TrainingCopy:
    """Copies of a model and a loss, and the arguments of a trainer for them.

    Attributes:
        model: in training mode.
        loss: in training mode.
        arguments: keyword arguments of `Trainer` besides model, loss and optimizer.
    """

    model: nn.Module
    loss: nn.Module
    arguments: dict[str, Any]

    @classmethod
    def of(cls, trainer: Trainer, device: torch.device, dtype: torch.dtype | None) -> TrainingCopy:
        """Return a copy of a trainer's parts on a device, in a precision unless it is None."""
        model, loss = copy.deepcopy(unwrapped(trainer.model)), copy.deepcopy(trainer.loss)
        for module in (model, loss):
            module.to(device=device, dtype=dtype)
            if not module.training:
                module.train()
        transform = copy.deepcopy(trainer.transform)
        if transform is not None and dtype is torch.float64:
            transform = DoubleTransform(transform)
        own = {"device": device, "transform": transform, "microbatch_size": None}
        return cls(model, loss, {**trainer.arguments, **FIXED, **own})

    @property
    def device(self) -> torch.device:
        """The device on which the copy runs."""
        device: torch.device = self.arguments["device"]
        return device

    def with_arguments(self, **arguments: Any) -> TrainingCopy:
        """Return this copy with other arguments of the trainer."""
        return attrs.evolve(self, arguments={**self.arguments, **arguments})

    def on_cpu(self) -> TrainingCopy:
        """Return a copy that runs on the CPU."""
        cpu = torch.device("cpu")
        moved = self.changed(lambda model, loss: (model.to(cpu), loss.to(cpu)))
        return moved.with_arguments(device=cpu)

    def changed(self, change: Callable[[nn.Module, nn.Module], object]) -> TrainingCopy:
        """Return a copy on whose model and loss `change` has been called."""
        model, loss = copy.deepcopy(self.model), copy.deepcopy(self.loss)
        change(model, loss)
        return attrs.evolve(self, model=model, loss=loss)

    def gradients(
        self, batch: Any, *, microbatch_size: int | None = None, seed: int = 0
    ) -> Gradients:
        """Return the gradients of an update made by the trainer's own step.

        The rank is added to the seed. Without a size of pieces, the batch stays whole.
        """
        found: Gradients = {}
        model, loss = copy.deepcopy(self.model), copy.deepcopy(self.loss)
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.0)
        own = {"microbatch_size": microbatch_size, "transform": self._transform()}
        trainer = Trainer(model, loss, optimizer, **{**self.arguments, **own})
        trainer.add_event_handler(
            StepEvents.GRADIENTS_READY, lambda: found.update(_gradients(model, loss))
        )
        with preserved_random_state():
            torch.manual_seed(seed + rank())
            trainer.run([batch], max_epochs=1)
        return found

    def _transform(self) -> Transform | None:
        transform: Transform | None = copy.deepcopy(self.arguments["transform"])
        return transform

    def transformed(self, batch: Any) -> Any:
        """Return the batch on the device, as the transform leaves it in the first update."""
        transform = placed_transform(self._transform(), None, self.device)
        batch = to_device(batch, self.device)
        return apply_transform(transform, batch, self.device, seed=0, epoch=1, iteration=1)

    def plain_gradients(self, batch: Any, size: int) -> Gradients:
        """Return the gradients of one graph over all pieces, without the trainer's step."""
        model, loss = copy.deepcopy(self.model), copy.deepcopy(self.loss)
        parts = split_batch(self.transformed(batch), size)
        with preserved_random_state():
            torch.manual_seed(0)
            outputs = join_outputs([self.arguments["task"](model, part) for part in parts], parts)
            sum_of_terms(loss_terms(loss, outputs)).backward()
        return _gradients(model, loss)


class DoubleTransform(nn.Module):
    """A transform that returns float64."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform.double() if isinstance(transform, nn.Module) else transform

    def forward(self, batch: Any) -> Any:
        """Return the transformed batch in float64."""
        return as_double(self.transform(batch))


def as_double(batch: Any) -> Any:
    """Return a batch whose floating-point tensors are float64."""

    def double(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.double() if floating else leaf

    return map_leaves(batch, double)


def check_not_sharded(trainer: Trainer) -> None:
    """Check that a trainer's model can be copied.

    Raises:
        ValueError: if the model is sharded over the ranks.
    """
    if has_shards(trainer.model):
        raise ValueError(
            "trainer must hold a whole model to be certified, got a sharded one. Certify it in a "
            "single process, where shard has no effect."
        )


BATCH_NORM, DROPOUT = _BatchNorm, _DropoutNd
"""The layers that see the other samples of a batch, and the layers that draw random numbers."""


def names_in_training(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Return the names of the modules of a class that are in training mode."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, kind) and module.training
    ]


def in_evaluation_mode(kind: type[nn.Module]) -> Callable[[nn.Module, nn.Module], None]:
    """Return a change for `TrainingCopy.changed` that puts the layers of a class in eval mode."""

    def change(*modules: nn.Module) -> None:
        for module in modules:
            for part in module.modules():
                if isinstance(part, kind):
                    part.eval()

    return change


def relative_error(found: Gradients, expected: Gradients) -> float:
    """Return the largest error of a tensor relative to its largest entry.

    The error of a tensor of rounding errors alone (the gradient of a bias before a batch norm) is
    relative to the other tensors. It is infinite if a side lacks a tensor or one is not finite.
    """
    if found.keys() != expected.keys():
        return math.inf
    sizes = {name: _largest(value) for name, value in expected.items()}
    floor = 1e-3 * max(sizes.values(), default=0.0) or 1.0
    errors = [
        _largest(found[name].double() - value.double()) / max(sizes[name], floor)
        for name, value in expected.items()
    ]
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def factor_of(found: Gradients, expected: Gradients) -> float:
    """Return the factor between the two with the smallest squared error."""
    first = torch.cat([found[name].double().reshape(-1) for name in expected])
    second = torch.cat([value.double().reshape(-1) for value in expected.values()])
    return float(first @ second / (second @ second))


def _largest(value: Tensor) -> float:
    return float(value.detach().abs().max()) if value.numel() else 0.0


def _gradients(model: nn.Module, loss: nn.Module) -> Gradients:
    named = nn.ModuleDict({"model": model, "loss": loss}).named_parameters()
    return {name: p.grad.to_dense().clone() for name, p in named if p.grad is not None}
