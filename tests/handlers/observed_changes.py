"""The changes that a handler makes in a run, observed around each call of its functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from diptych.engine import Change, RunEvents, SeededLoader, Trainer
from diptych.engine.certificate.handler_changes import snapshot
from diptych.engine.loop.listener import Listener
from diptych.engine.loop.periodic import Periodic


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
        before = everything(self.trainer)
        try:
            yield
        finally:
            after = everything(self.trainer)
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


def everything(trainer: Trainer) -> dict[Change, Any]:
    """Return copies of everything in a run that a handler may change, its loader included."""
    found, data = snapshot(trainer), trainer.state.dataloader
    size = data.batch_size if isinstance(data, SeededLoader) else None
    return {**found, Change.BATCH: [found[Change.BATCH], id(data), size]}


def same(first: Any, second: Any) -> bool:
    """Return whether two values are equal; NaN equals NaN."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.allclose(
            first, second.to(first), rtol=0, atol=0, equal_nan=True
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
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
