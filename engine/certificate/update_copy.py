"""Copies of a training that can be run apart from it, one update at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from diptych.engine.containers import map_leaves
from diptych.engine.data.batches import split, to_device
from diptych.engine.data.transform import Transform, placed_transform, transformed
from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.events import StepEvents
from diptych.engine.modules import unwrapped
from diptych.engine.random_state import preserved_random_state
from diptych.engine.step.loss_contract import loss_terms, sum_of_terms
from diptych.engine.step.microbatch import joined
from diptych.engine.step.train_step import TrainStep
from diptych.engine.tasks import Task
from diptych.engine.trainer import Step, Trainer

Gradients = dict[str, Tensor]


@attrs.frozen
class Specimen:
    """A model and a loss, copied, and what else an update needs.

    Attributes:
        model: in training mode.
        loss: what is minimised.
        task: what a batch means.
        step: the trainer's own, or None.
        device: where it runs.
        transform: the trainer's own, a copy.
    """

    model: nn.Module
    loss: nn.Module
    task: Task
    step: Step | type[TrainStep] | None
    device: torch.device
    transform: Transform | None = None

    @classmethod
    def of(cls, trainer: Trainer, device: torch.device, dtype: torch.dtype | None) -> Specimen:
        """Return copies of a trainer's parts, in another precision where one is given."""
        model, loss = copy.deepcopy(unwrapped(trainer.model)), copy.deepcopy(trainer.loss)
        for module in (model, loss):
            module.to(device=device, dtype=dtype)
            if not module.training:
                module.train()
        transform = copy.deepcopy(trainer.transform)
        if transform is not None and dtype is torch.float64:
            transform = InDouble(transform)
        return cls(model, loss, trainer.task, trainer.step, device, transform)

    def on_cpu(self) -> Specimen:
        """Return a copy that runs on the CPU."""
        cpu = torch.device("cpu")
        moved = self.changed(lambda model, loss: (model.to(cpu), loss.to(cpu)))
        return attrs.evolve(moved, device=cpu)

    def changed(self, change: Callable[[nn.Module, nn.Module], object]) -> Specimen:
        """Return a copy on whose model and loss `change` has been called."""
        model, loss = copy.deepcopy(self.model), copy.deepcopy(self.loss)
        change(model, loss)
        return attrs.evolve(self, model=model, loss=loss)

    def gradients(
        self, batch: Any, *, microbatch_size: int | None = None, seed: int = 0
    ) -> Gradients:
        """Return the gradients of an update as the trainer's own step makes them.

        Args:
            batch: of this rank, where there are several.
            microbatch_size: samples of a piece.
            seed: of the random draws, plus the rank.
        """
        found: Gradients = {}
        model, loss = copy.deepcopy(self.model), copy.deepcopy(self.loss)
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.0)
        trainer = Trainer(
            model,
            loss,
            optimizer,
            task=self.task,
            microbatch_size=microbatch_size,
            device=self.device,
            step=self.step,
            transform=copy.deepcopy(self.transform),
        )
        trainer.add_event_handler(
            StepEvents.GRADIENTS_READY, lambda: found.update(_copied(trainer))
        )
        with preserved_random_state():
            torch.manual_seed(seed + rank())
            trainer.run([batch], max_epochs=1)
        return found

    def transformed(self, batch: Any) -> Any:
        """Return what the first update's model is to see of a batch, on the device."""
        transform = placed_transform(copy.deepcopy(self.transform), None, self.device)
        batch = to_device(batch, self.device)
        return transformed(transform, batch, self.device, seed=0, epoch=1, iteration=1)

    def plain_gradients(self, batch: Any, pieces: int, *, seed: int = 0) -> Gradients:
        """Return the gradients of one graph over all pieces, without the trainer's step."""
        model, loss = copy.deepcopy(self.model), copy.deepcopy(self.loss)
        parts = split(self.transformed(batch), pieces)
        with preserved_random_state():
            torch.manual_seed(seed)
            outputs = joined([self.task(model, part) for part in parts], parts)
            sum_of_terms(loss_terms(loss, outputs)).backward()
        return _gradients(model, loss)


class InDouble(nn.Module):
    """A transform whose results are of float64, as the batches that it is given are.

    Args:
        transform: of a batch.
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform.double() if isinstance(transform, nn.Module) else transform

    def forward(self, batch: Any) -> Any:
        """Return what the transform makes of the batch."""
        return in_double(self.transform(batch))


def in_double(batch: Any) -> Any:
    """Return a batch whose tensors of floating point are of float64."""

    def double(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.double() if floating else leaf

    return map_leaves(batch, double)


def check_whole(trainer: Trainer) -> None:
    """Check that a trainer's model can be copied.

    Raises:
        ValueError: if it is shared out over the ranks.
    """
    if has_shards(trainer.model):
        raise ValueError(
            "a certificate is of a model that this process holds, got one that is sharded: certify "
            "it in a process without other ranks, where shard changes nothing"
        )


def names_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Return the names of the modules of a kind that are in training mode."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, kind) and module.training
    ]


BATCH_NORM, DROPOUT = _BatchNorm, _DropoutNd
"""Layers that see the other samples of a batch, and those that draw random numbers."""


def in_evaluation_mode(kind: type[nn.Module]) -> Callable[[nn.Module, nn.Module], None]:
    """Return a change that takes the layers of a kind out of training."""

    def change(*modules: nn.Module) -> None:
        for module in modules:
            for part in module.modules():
                if isinstance(part, kind):
                    part.eval()

    return change


def relative_error(found: Gradients, expected: Gradients) -> float:
    """Return the largest error of a tensor relative to its largest entry.

    A tensor that is nothing but rounding (the gradient of a bias before a batch norm) is measured
    by the others. Where one side lacks a tensor, or one is not finite, the error is infinite.
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
    """Return the factor between the two that fits best."""
    first = torch.cat([found[name].double().reshape(-1) for name in expected])
    second = torch.cat([value.double().reshape(-1) for value in expected.values()])
    return float(first @ second / (second @ second))


def _largest(value: Tensor) -> float:
    return float(value.detach().abs().max()) if value.numel() else 0.0


def _copied(trainer: Trainer) -> Gradients:
    return _gradients(trainer.model, trainer.loss)


def _gradients(model: nn.Module, loss: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in _named(model, loss) if p.grad is not None}


def _named(model: nn.Module, loss: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for part, module in (("model", model), ("loss", loss)):
        for name, parameter in module.named_parameters():
            yield f"{part}.{name}", parameter
