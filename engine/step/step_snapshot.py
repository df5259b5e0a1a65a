"""The state before a step that the step may change: restored if it raises before its update."""

from __future__ import annotations

import enum
import operator
from collections.abc import Mapping
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.engine.random_state import GeneratorSnapshot
from diptych.engine.step.buffer_copies import BufferCopies

VERSION, PARAMETERS = attrgetter("_version"), itemgetter("params")


class SnapshotParts(Protocol):
    """The parts of a `Trainer` that a snapshot reads and restores."""

    device: torch.device
    model: nn.Module
    optimizer: Optimizer
    transform: Any
    scaler: torch.amp.GradScaler | None

    @property
    def loss(self) -> nn.Module:
        """The loss."""
        ...

    @property
    def metrics(self) -> Any:
        """The `MetricsCollector`."""
        ...


class Failed(enum.Enum):
    """The state of the weights after a step that has raised.

    Attributes:
        BEFORE_UPDATE: they are unchanged.
        AFTER_UPDATE: the optimizer has completed an update.
        INSIDE_UPDATE: an update was cut off: some of them may be updated.
    """

    BEFORE_UPDATE = "before_update"
    AFTER_UPDATE = "after_update"
    INSIDE_UPDATE = "inside_update"


class StepSnapshot:
    """Random generators, buffers, published values and versions of the weights before a step.

    Cost: a few microseconds a step, and a fraction of a microsecond for each parameter and buffer;
    a large buffer that each step changes, such as a queue, is copied before each step.
    """

    def __init__(self, trainer: SnapshotParts) -> None:
        self._trainer = trainer
        self._generators = GeneratorSnapshot(trainer.device)
        self._updates = (0, 0)
        self._versions: list[int] = []
        self._published: Any = None
        self.find()

    def find(self) -> None:
        """Find the buffers of the trainer's modules; call it when a module may have got others."""
        trainer = self._trainer
        self._parts = (trainer.model, trainer.loss, trainer.optimizer)
        modules = (trainer.model, trainer.loss, trainer.transform)
        self._buffers = BufferCopies(part for part in modules if isinstance(part, nn.Module))
        self._counter, self._of_members = counters_of(trainer.optimizer)

    def take(self) -> None:
        """Remember the state before a step."""
        trainer = self._trainer
        parts = (trainer.model, trainer.loss, trainer.optimizer)
        if not all(map(operator.is_, parts, self._parts)):
            self.find()
        self._generators.take()
        self._buffers.take()
        self._updates = (self._counter.count, self._of_members.count)
        self._versions = versions_of(trainer.optimizer)
        self._published = trainer.metrics.mark()

    def judge(self, *, by_members: bool) -> Failed:
        """Return how far the update of a step that has raised came.

        Args:
            by_members: whether the step calls the members of an optimizer that is composed of
                several, so that the update of one of them counts.
        """
        updates = (self._counter.count, self._of_members.count)
        if updates[0] != self._updates[0] or (by_members and updates != self._updates):
            return Failed.AFTER_UPDATE
        is_same = versions_of(self._trainer.optimizer) == self._versions
        return Failed.BEFORE_UPDATE if is_same else Failed.INSIDE_UPDATE

    def restore(self) -> list[str]:
        """Restore the state before the step; return the names of the buffers that were lost."""
        self._generators.restore()
        lost = self._buffers.restore()
        self._trainer.metrics.drop_since(self._published)
        reset_unscaling(self._trainer.scaler)
        return lost


def versions_of(optimizer: Optimizer) -> list[int]:
    """Return the versions of an optimizer's parameters, and of the first one's state.

    torch raises a tensor's version with each change in place, from 0. An update may change the
    state of the first parameter before any parameter.
    """
    versions = [*map(VERSION, chain.from_iterable(map(PARAMETERS, optimizer.param_groups)))]
    for state in optimizer.state.values():
        if type(state) is dict or isinstance(state, Mapping):  # the first test is the faster one
            tensors = [value for value in state.values() if isinstance(value, Tensor)]
            versions += map(VERSION, tensors)
        break
    return versions


def reset_unscaling(scaler: torch.amp.GradScaler | None) -> None:
    """Let a gradient scaler unscale gradients again that a failed step has unscaled."""
    scale = None if scaler is None else scaler._get_scale_async()  # noqa: SLF001 - without waiting
    if scaler is not None and scale is not None:
        scaler.update(scale)


class UpdateCounter:
    """The number of updates that an optimizer has completed; a hook after its step.

    Attributes:
        count: completed updates since the counter was made.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *_: object) -> None:
        """Count an update."""
        self.count += 1


_COUNTERS: WeakKeyDictionary[Optimizer, tuple[UpdateCounter, UpdateCounter]] = WeakKeyDictionary()


def counters_of(optimizer: Optimizer) -> tuple[UpdateCounter, UpdateCounter]:
    """Return the counter of an optimizer, and that of its members if it is composed of several."""
    counters = _COUNTERS.get(optimizer)
    if counters is None:
        counters = _COUNTERS[optimizer] = (UpdateCounter(), UpdateCounter())
        _count(optimizer, counters[0])
        for member in getattr(optimizer, "members", ()):
            _count(member, counters[1])
    return counters


def _count(optimizer: Optimizer, counter: UpdateCounter) -> None:
    handle = optimizer.register_step_post_hook(counter)
    hooks = handle.hooks_dict_ref()
    assert hooks is not None
    hooks.move_to_end(handle.id, last=False)  # before hooks that may raise
