"""Contexts that restore what a trial changes: a trainer's parts, modules, metrics."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from ignite.metrics import Metric
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.engine.containers import held_of
from diptych.engine.modules import SavedBuffers
from diptych.engine.random_state import preserved_random_state

CONTAINERS = (dict, list, set)


@contextmanager
def parts_preserved(trainer: Any) -> Iterator[None]:
    """Restore model, loss, task, transform, optimizer and random generators of a trainer."""
    parts = (trainer.model, trainer.loss, trainer.task, trainer.transform)
    modules = [part for part in parts if isinstance(part, nn.Module)]
    with ExitStack() as contexts:
        contexts.enter_context(preserved_random_state())
        contexts.enter_context(modules_restored(*modules))
        for optimizer in getattr(trainer, "optimizers", [trainer.optimizer]):
            contexts.enter_context(optimizer_restored(optimizer))
        yield


@contextmanager
def metrics_restored(metrics: Iterable[Metric]) -> Iterator[None]:
    """Restore the attributes of metrics, and of the metrics that they are made of."""
    with attributes_restored(part for metric in metrics for part in held_of(Metric, metric)):
        yield


@contextmanager
def attributes_restored(owners: Iterable[object]) -> Iterator[None]:
    """Restore the attributes of objects, but not the content of what they refer to."""
    saved = [(owner, dict(vars(owner))) for owner in owners]
    try:
        yield
    finally:
        for owner, attributes in saved:
            vars(owner).clear()
            vars(owner).update(attributes)


@contextmanager
def _contents_restored(owners: Iterable[object]) -> Iterator[None]:
    """Restore the content of the containers among the attributes of objects.

    The containers keep their identity: others may hold them, as a hook's handle does.
    """
    held = (value for owner in owners for value in vars(owner).values())
    saved = [(value, copy.copy(value)) for value in held if isinstance(value, CONTAINERS)]
    try:
        yield
    finally:
        for container, content in saved:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


@contextmanager
def modules_restored(*modules: nn.Module) -> Iterator[None]:
    """Restore weights, buffers, gradients, modes and attributes of modules.

    It holds a copy of the weights. Gradients, and functions that wait for them, are absent inside
    the context.
    """
    parts = [part for module in modules for part in module.modules()]
    parameters = [p for part in parts for p in part.parameters(recurse=False)]
    gradients = [(p, p.grad, p.requires_grad) for p in parameters]
    hooks = [(p, p._post_accumulate_grad_hooks) for p in parameters]  # noqa: SLF001 - torch's own
    tensors = [*parameters, *_buffers(modules)]
    with attributes_restored(parts), _contents_restored(parts), _tensors_restored(tensors):
        try:
            for parameter in parameters:
                parameter.grad = None
                parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment] # noqa: SLF001
            yield
        finally:
            for parameter, gradient, trainable in gradients:
                parameter.grad = gradient
                parameter.requires_grad_(trainable)
            for parameter, held in hooks:
                parameter._post_accumulate_grad_hooks = held  # noqa: SLF001


@contextmanager
def buffers_restored(*modules: nn.Module) -> Iterator[None]:
    """Restore the buffers of modules, which a forward pass may change or replace."""
    saved = SavedBuffers(*modules)
    try:
        yield
    finally:
        saved.restore()


@contextmanager
def optimizer_restored(optimizer: Optimizer) -> Iterator[None]:
    """Restore an optimizer and those that it is made of; inside, it works on a copy of its state.

    Functions that handlers have added to its `step` are not called inside the context.
    """
    optimizers = list(held_of(Optimizer, optimizer))
    with attributes_restored(optimizers):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # assigns new containers
        for one in optimizers:
            hooks = {name: type(v)() for name, v in vars(one).items() if name.endswith("_hooks")}
            vars(one).update(hooks)
        yield


def _buffers(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [buffer for module in modules for buffer in module.buffers()]


@contextmanager
def _tensors_restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in saved:
                tensor.copy_(before)
