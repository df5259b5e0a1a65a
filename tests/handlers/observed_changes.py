"""The changes that a handler makes in a run, observed around each call of its functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from diptych.engine import Change, RunEvents, SeededLoader, Trainer
from diptych.engine.loop.listener import Listener
from diptych.engine.loop.periodic import Periodic
from diptych.engine.random_state import random_state

Snapshot = dict[Change, Any]


@attrs.define(eq=False)
class ChangeObserver:
    """Calls a trainer's listeners one by one and records which kinds of `Change` each makes.

    A change that a nested listener makes (an evaluation fires `EVALUATED`) is recorded for that
    listener only. An optimizer step that leaves all parameters as they are, although they have
    gradients, was withheld by a handler: it counts as a change of weights. What `RESTORE` loads
    from a checkpoint does not count.

    Attributes:
        trainer: the trainer to observe.
        observed: the kinds of change that were seen, with the listener that made the first one.
    """

    trainer: Trainer
    observed: dict[Change, str] = attrs.field(factory=dict)
    _nested: list[set[Change]] = attrs.field(factory=lambda: [set()])
    _before_step: list[Tensor] = attrs.field(factory=list)

    def attach(self, *handlers: Any) -> None:
        """Attach handlers, and observe what attaching them changes."""
        with self._watching("attach"):
            self.trainer.attach(*handlers)

    def run(self, loader: Any, **limits: Any) -> None:
        """Run the trainer, and observe what its listeners change."""
        hooks = [
            self.trainer.optimizer.register_step_pre_hook(self._remember_step),
            self.trainer.optimizer.register_step_post_hook(self._judge_step),
        ]
        try:
            with self.trainer.calling(self._call):
                self.trainer.run(loader, **limits)
        finally:
            for hook in hooks:
                hook.remove()

    def _call(self, listener: Listener) -> None:
        owner = _owner(listener.function)
        if owner is self.trainer or isinstance(owner, Periodic):
            listener.call(self.trainer, (), {})  # the trainer's own work; or it calls others
        elif listener.event is RunEvents.RESTORE:
            listener.call(self.trainer, (), {})
        else:
            with self._watching(listener.name):
                listener.call(self.trainer, (), {})

    @contextmanager
    def _watching(self, name: str) -> Iterator[None]:
        self._nested.append(set())
        before = snapshot(self.trainer)
        try:
            yield
        finally:
            after = snapshot(self.trainer)
            nested = self._nested.pop()
            changed = {kind for kind in before if not same(before[kind], after[kind])}
            for kind in changed - nested:
                self.observed.setdefault(kind, name)
            self._nested[-1] |= changed

    def _held(self) -> list[Tensor]:
        return [p for group in self.trainer.optimizer.param_groups for p in group["params"]]

    def _remember_step(self, *_: Any) -> None:
        self._before_step = [p.detach().clone() for p in self._held()]

    def _judge_step(self, optimizer: Any, *_: Any) -> None:
        moved = not same(self._before_step, self._held())
        expected = any(
            group["lr"] and any(p.grad is not None for p in group["params"])
            for group in self.trainer.optimizer.param_groups
        )
        if expected and not moved:
            self.observed.setdefault(Change.WEIGHTS, "a step of the optimizer that was withheld")


def snapshot(trainer: Trainer) -> Snapshot:
    """Return copies of everything in a run that a handler may change, by kind."""
    parts: dict[str, nn.Module] = {"model": trainer.model, "loss": trainer.loss}
    parameters = [p for part in parts.values() for p in part.parameters()]
    modules = [module for part in parts.values() for module in part.modules()]
    data, state = trainer.state.dataloader, trainer.state
    return {
        Change.WEIGHTS: copied(parameters),
        Change.BUFFERS: copied([b for part in parts.values() for b in part.buffers()]),
        Change.GRADIENTS: copied([p.grad for p in parameters]),
        Change.RATES: [
            {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
            for group in trainer.optimizer.param_groups
        ],
        Change.TRAINABLE: [p.requires_grad for p in parameters],
        Change.MODE: [module.training for module in modules],
        Change.LOSS: [id(trainer.loss), *map(plain_attributes, trainer.loss.modules())],
        Change.BATCH: [
            copied(state.batch),
            id(data),
            data.batch_size if isinstance(data, SeededLoader) else None,
        ],
        Change.RANDOM_STATE: random_state(),
        Change.RUN_LENGTH: [
            state.max_epochs,
            state.max_iters,
            state.epoch_length,
            trainer.should_terminate,
            trainer.should_terminate_single_epoch,
            trainer.should_interrupt,
        ],
    }


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the numbers and words among a module's attributes."""
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, (int, float, str, type(None)))
    }


def copied(value: Any) -> Any:
    """Return a value with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(one) for one in value]
    return value


def same(first: Any, second: Any) -> bool:
    """Return whether two snapshots are equal, NaN included."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(
            first.nan_to_num(nan=7e7) if first.is_floating_point() else first,
            second.nan_to_num(nan=7e7) if second.is_floating_point() else second,
        )
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def _owner(function: Callable[..., Any]) -> object:
    """Return the object whose method a function is, through partials and Ignite's filters."""
    parent = getattr(function, "_parent", None)
    if parent is not None:
        function = parent()
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__self__", function)
