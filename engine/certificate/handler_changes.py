"""One update with and without the attached handlers, and the changes that each handler makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from ignite.engine import Events
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.engine.certificate.differences import find_differences
from diptych.engine.certificate.report import Check
from diptych.engine.certificate.training_copy import relative_error
from diptych.engine.containers import leaves, map_leaves
from diptych.engine.events import StepEvents
from diptych.engine.handler import Change, contract_of
from diptych.engine.loop.listener import Listener
from diptych.engine.loop.periodic import Periodic
from diptych.engine.random_state import preserved_random_state, random_state
from diptych.engine.state.handler_states import stateful_handlers
from diptych.engine.state.references import is_scheduler
from diptych.engine.trainer import Trainer

EVENTS = (Events.ITERATION_STARTED, *StepEvents, Events.ITERATION_COMPLETED)
"""The events of an iteration; those that a handler fires itself (a log point) are left out."""
RUN_LENGTH = ("max_epochs", "max_iters", "epoch_length")
STOPS = ("should_terminate", "should_terminate_single_epoch", "should_interrupt")


def check_handlers(trainer: Trainer, batch: Any) -> Check:
    """Compare the weights after an update with handlers and after one without.

    The check fails if a handler makes a change that it does not declare in `Handler.changes`, and
    names every handler that makes one. Handlers with a period are called in any iteration.
    """
    observer = ChangeObserver(trainer)
    with _preserved(trainer), trainer.calling(lambda _: None):
        expected = _weights_after(trainer, batch)
    with _preserved(trainer), trainer.calling(observer.call):
        found = _weights_after(trainer, batch)
    return Check(
        f"with {len(trainer.handlers)} handlers",
        relative_error(found, expected),
        passed=not observer.undeclared,
        remark="; ".join((*observer.undeclared, *observer.declared)),
    )


@attrs.define(eq=False)
class ChangeObserver:
    """Calls listeners one at a time and records the changes that each of them makes.

    Attributes:
        trainer: the trainer to whose events they listen.
        undeclared: the listeners with a change that they do not declare, in words.
        declared: the listeners whose changes are all declared, in words.
    """

    trainer: Trainer
    undeclared: list[str] = attrs.field(factory=list)
    declared: list[str] = attrs.field(factory=list)

    def call(self, listener: Listener) -> None:
        """Call a listener of the iteration's events, or every listener that it combines."""
        if isinstance(listener.function, Periodic):
            for one in listener.function.listeners:
                self.call(one)
        elif listener.event in EVENTS:
            before = snapshot(self.trainer)
            listener.call(self.trainer, (), {})
            after = snapshot(self.trainer)
            changed = [
                change
                for change in Change
                if any(find_differences("", before[change], after[change]))
            ]
            if changed:
                self._record(listener, changed)

    def _record(self, listener: Listener, changed: list[Change]) -> None:
        declared = contract_of(listener.owner).changes | _purpose(listener.owner)
        undeclared = [change for change in changed if change not in declared]
        words = " and ".join(change.value for change in undeclared or changed)
        if undeclared:
            self.undeclared.append(f"{listener.name} changes {words}")
        else:
            self.declared.append(f"{listener.name} changes {words}, as declared")


def _purpose(owner: object) -> set[Change]:
    """Return what an object of torch or Ignite at an event is there to change."""
    if is_scheduler(owner):
        return {Change.RATES}
    return {Change.WEIGHTS} if isinstance(owner, Optimizer) else set()


def snapshot(trainer: Trainer) -> dict[Change, Any]:
    """Return copies of everything in a run that a handler may change."""
    return {change: read(trainer) for change, read in READERS.items()}


def _modules(trainer: Trainer) -> list[nn.Module]:
    return [part for module in (trainer.model, trainer.loss) for part in module.modules()]


def _parameters(trainer: Trainer) -> list[nn.Parameter]:
    return [p for part in _modules(trainer) for p in part.parameters(recurse=False)]


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module, without those that torch sets."""
    return {
        name: value
        for name, value in vars(module).items()
        if (value is None or isinstance(value, (bool, int, float, str, tuple)))
        and name not in vars(_PLAIN)
    }


_PLAIN = nn.Module()

READERS: dict[Change, Callable[[Trainer], Any]] = {
    Change.WEIGHTS: lambda trainer: [_copied(p) for p in _parameters(trainer)],
    Change.GRADIENTS: lambda trainer: [_copied(p.grad) for p in _parameters(trainer)],
    Change.BUFFERS: lambda trainer: [
        _copied(buffer) for part in _modules(trainer) for buffer in part.buffers(recurse=False)
    ],
    Change.TRAINABLE: lambda trainer: [p.requires_grad for p in _parameters(trainer)],
    Change.MODE: lambda trainer: [part.training for part in _modules(trainer)],
    Change.RATES: lambda trainer: [
        {name: _copied(value) for name, value in group.items() if name != "params"}
        for group in trainer.optimizer.param_groups
    ],
    Change.BATCH: lambda trainer: [_copied(leaf) for leaf in leaves(trainer.state.batch)],
    Change.LOSS: lambda trainer: [id(trainer.loss), *map(_settings, trainer.loss.modules())],
    Change.RUN_LENGTH: lambda trainer: [
        *(getattr(trainer.state, name) for name in RUN_LENGTH),
        *(getattr(trainer, name) for name in STOPS),
    ],
    Change.RANDOM_STATE: lambda _: random_state(),
}
"""The part of a run that belongs to each change, as a copy."""


def _weights_after(trainer: Trainer, batch: Any) -> dict[str, Tensor]:
    """Make one update, with the events of its iteration; return the weights."""
    trainer.state.iteration += 1
    trainer.state.batch = map_leaves(batch, _copied)  # a handler may change it in place
    trainer.fire_event(Events.ITERATION_STARTED)
    trainer.state.output = trainer.make_update(trainer.state.batch)
    trainer.fire_event(Events.ITERATION_COMPLETED)
    return {
        f"{name}.{key}": value.detach().clone()
        for name in ("model", "loss")
        for key, value in getattr(trainer, name).state_dict().items()
        if isinstance(value, Tensor)
    }


@contextmanager
def _preserved(trainer: Trainer) -> Iterator[None]:
    """Restore on exit everything that an update or a handler changes."""
    loss, stops = trainer.loss, {name: getattr(trainer, name) for name in STOPS}
    state, metrics = dict(vars(trainer.state)), dict(trainer.state.metrics)
    modules = [(part, part.training, _settings(part)) for part in _modules(trainer)]
    trainable = [(p, p.requires_grad) for p in _parameters(trainer)]
    with _preserved_states(trainer), preserved_random_state():
        try:
            yield
        finally:
            if trainer.loss is not loss:
                trainer.loss = loss
            for part, training, settings in modules:
                vars(part).update(settings, training=training)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            vars(trainer.state).update(state, metrics=metrics)
            vars(trainer).update(stops)
            trainer.optimizer.zero_grad(set_to_none=True)


@contextmanager
def _preserved_states(trainer: Trainer) -> Iterator[None]:
    """Restore on exit the states of the trainer's parts and handlers."""
    parts = [trainer.model, trainer.loss, trainer.optimizer, trainer.metrics, trainer.scaler]
    holders: list[Any] = [*parts, *stateful_handlers(trainer).values()]
    states = [(one, copy.deepcopy(one.state_dict())) for one in holders if one is not None]
    try:
        yield
    finally:
        for holder, state in states:
            holder.load_state_dict(state)
