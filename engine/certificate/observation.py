"""One update with and without the handlers that are attached."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine.certificate.report import Check
from diptych.engine.certificate.update_copy import relative_error
from diptych.engine.events import StepEvents
from diptych.engine.loop.listener import Listener
from diptych.engine.loop.periodic import Periodic
from diptych.engine.random_state import preserved_random_state, random_state
from diptych.engine.state.handler_states import stateful_handlers
from diptych.engine.trainer import Trainer

WATCHED = (Events.ITERATION_STARTED, *StepEvents, Events.ITERATION_COMPLETED)
"""Events of an iteration; what a handler fires itself (a log point) is left out."""


def check_handlers(trainer: Trainer, batch: Any) -> Check:
    """Compare the weights after an update with handlers and after one without.

    A handler whose work is to change something says so in an attribute `changes`, a tuple of
    "gradients", "weights" and "random numbers"; it is named, and the check passes. Handlers that
    come every n iterations are called as if their iteration had come.
    """
    witness = Witness(trainer)
    with _preserved(trainer), trainer.calling(lambda _: None):
        expected = _weights_after(trainer, batch)
    with _preserved(trainer), trainer.calling(witness.call):
        found = _weights_after(trainer, batch)
    return Check(
        f"with {len(trainer.handlers)} handlers",
        relative_error(found, expected),
        passed=not witness.guilty,
        remark="; ".join((*witness.guilty, *witness.declared)),
    )


@attrs.define(eq=False)
class Witness:
    """Calls listeners one at a time and notes what each of them changes.

    Attributes:
        trainer: whose listeners they are.
        guilty: what changed something that it does not declare.
        declared: what changed what it declares.
    """

    trainer: Trainer
    guilty: list[str] = attrs.field(factory=list)
    declared: list[str] = attrs.field(factory=list)

    def call(self, listener: Listener) -> None:
        """Call a listener of the iteration's events, or all that it stands for."""
        if isinstance(listener.function, Periodic):
            for one in listener.function.listeners:
                self.call(one)
        elif listener.event in WATCHED:
            before = self._seen()
            listener.call(self.trainer, (), {})
            after = self._seen()
            changed = [kind for kind in before if not _same(before[kind], after[kind])]
            if changed:
                self._note(listener, changed)

    def _note(self, listener: Listener, changed: list[str]) -> None:
        owner = getattr(listener.function, "__self__", None)
        allowed = getattr(owner, "changes", ())
        foreign = [kind for kind in changed if kind not in allowed]
        if foreign:
            self.guilty.append(f"{listener.name} changes {' and '.join(foreign)}")
        else:
            self.declared.append(f"{listener.name} changes {' and '.join(changed)}, as it says")

    def _seen(self) -> dict[str, Any]:
        parts = (self.trainer.model, self.trainer.loss)
        parameters = [p for part in parts for p in part.parameters()]
        return {
            "gradients": [None if p.grad is None else p.grad.clone() for p in parameters],
            "weights": [
                tensor.detach().clone()
                for part in parts
                for tensor in (*part.parameters(), *part.buffers())
            ],
            "random numbers": random_state(),
        }


def _weights_after(trainer: Trainer, batch: Any) -> dict[str, Tensor]:
    """Make one update, with the events of its iteration; return the weights."""
    trainer.state.iteration += 1
    trainer.state.batch = batch
    trainer.fire_event(Events.ITERATION_STARTED)
    trainer.state.output = trainer.make_update(batch)
    trainer.fire_event(Events.ITERATION_COMPLETED)
    return {
        f"{name}.{key}": value.detach().clone()
        for name in ("model", "loss")
        for key, value in getattr(trainer, name).state_dict().items()
        if isinstance(value, Tensor)
    }


@contextmanager
def _preserved(trainer: Trainer) -> Iterator[None]:
    """Put everything back that an update changes."""
    holders: dict[str, Any] = {
        "model": trainer.model,
        "loss": trainer.loss,
        "optimizer": trainer.optimizer,
        "metrics": trainer.metrics,
        **{f"handler {name}": h for name, h in stateful_handlers(trainer).items()},
    }
    if trainer.scaler is not None:
        holders["scaler"] = trainer.scaler
    before = {name: copy.deepcopy(holder.state_dict()) for name, holder in holders.items()}
    state = dict(vars(trainer.state))
    metrics = dict(trainer.state.metrics)
    with preserved_random_state():
        try:
            yield
        finally:
            for name, holder in holders.items():
                holder.load_state_dict(before[name])
            for key, value in state.items():
                setattr(trainer.state, key, value)
            trainer.state.metrics = metrics
            trainer.optimizer.zero_grad(set_to_none=True)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    if isinstance(first, dict):
        return all(_same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    return bool(first == second)
