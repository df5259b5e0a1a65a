"""The momentum encoder: a slow copy of an encoder, which gives the keys or the targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import attrs
import torch
from ignite.engine import Events
from torch import nn

from diptych.engine.events import StepEvents
from diptych.engine.modules import unwrapped
from diptych.engine.trainer import Trainer
from diptych.handlers.optimization.moving_average import (
    MadeUpdates,
    Place,
    follow,
    is_continuous,
    places,
)
from diptych.handlers.optimization.weight_average import check_share

MOST_EPSILON = torch.finfo(torch.float32).eps

Part = str | Callable[[nn.Module], nn.Module]
"""A part of a model: its dotted path, or a function that returns it."""


@attrs.define(kw_only=True, eq=False)
class MomentumEncoder:
    """Lets one part of the model follow another one slowly, as MoCo and BYOL need it.

    The model holds both parts, and the task calls the follower without gradient:

    ```python
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.target = make_encoder(), make_encoder()


    def queries_and_keys(model, batch):
        with torch.no_grad():
            keys = model.target(batch["second"])
        return {"query": model.online(batch["first"]), "key": keys}


    trainer.attach(MomentumEncoder(momentum=0.99))
    ```

    A run begins with target = online. After each update target = m target + (1 - m) online, weights
    and floating-point buffers (a batch norm's statistics) alike; what is no floating-point number
    is copied. m is `momentum` or, with the cosine schedule, 1 - (1 - momentum) (1 + cos(pi k / K))
    / 2 after update k of K, counted from 0. An update that was left out, by fp16's scaler or a
    guard, leaves the target as it is. The target's parameters require no gradient from
    when this is attached; both parts are the model's own, so a checkpoint holds them.

    Over several ranks each does the same to the same weights; buffers are rank 0's, as always.

    Source: He et al. 2020, arXiv:1911.05722; Grill et al. 2020, arXiv:2006.07733, for the cosine.

    Event: `StepEvents.OPTIMIZER_STEPPED`; `Events.STARTED` makes both parts equal.
    Cost: one pass over both parts for each update, in one kernel a type; no synchronisation, no
        memory beside the target's. `train/momentum` is published at log points.

    Args:
        online: the part that is trained.
        target: the part that follows, of the same structure.
        momentum: m, in [0, 1): 0.999 in MoCo, 0.996 in BYOL; less for short runs.
        schedule: "constant", or "cosine" from `momentum` to 1.
        total: K, updates until the cosine ends. Default: those of the run.

    Raises:
        ValueError: if an argument is out of range; when attached, if the model lacks a part, they
            differ in structure, or the target is in half precision; when a run starts, if its
            length is needed and unknown.
    """

    online: Part = "online"
    target: Part = "target"
    momentum: float = attrs.field(default=0.999, validator=check_share)
    schedule: Literal["constant", "cosine"] = attrs.field(
        default="constant", validator=attrs.validators.in_(("constant", "cosine"))
    )
    total: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.ge(1))
    )
    _pairs: list[tuple[Place, Place]] = attrs.field(factory=list, init=False, repr=False)
    _made: MadeUpdates = attrs.field(factory=MadeUpdates, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Let the target in the trainer's model follow after each update."""
        model = unwrapped(trainer.model)
        online, target = (_part(model, path) for path in (self.online, self.target))
        own = {id(part) for part in model.modules()}
        if not {id(online), id(target)} <= own:
            raise ValueError(
                "online and target must be modules of the model, whose checkpoint holds them, got "
                "one that is elsewhere"
            )
        self._pairs = _paired(online, target)
        _check_precision(self._pairs)
        for parameter in target.parameters():
            parameter.requires_grad_(False)
        self._made.attach(trainer)
        trainer.metrics.gauge("train/momentum", lambda: self._momentum(trainer))
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, self._update)

    def factor(self, update: int, total: int | None) -> float:
        """Return m after an update.

        Args:
            update: k, counted from 0.
            total: K; None where the momentum is constant.
        """
        if self.schedule == "constant" or total is None:
            return self.momentum
        done = min(1.0, update / total)
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * done)) / 2

    def _momentum(self, trainer: Trainer) -> float:
        return self.factor(max(0, trainer.state.iteration - 1), self._length(trainer))

    def _length(self, trainer: Trainer) -> int | None:
        state = trainer.state
        if self.total is not None or state.max_iters is not None:
            return self.total or state.max_iters
        if state.max_epochs is None or state.epoch_length is None:
            return None
        return int(state.max_epochs * state.epoch_length)

    @torch.no_grad()
    def _start(self, trainer: Trainer) -> None:
        if self.schedule == "cosine" and self._length(trainer) is None:
            raise ValueError(
                "a cosine schedule needs the run's length, got a loader without one: give "
                "MomentumEncoder a total, or run an epoch_length"
            )
        if trainer.state.iteration == 0:
            for online, target in self._pairs:
                target.tensor.copy_(online.tensor)

    @torch.no_grad()
    def _update(self, trainer: Trainer) -> None:
        made = self._made.last()
        if made is False:
            return
        averages, values = [], []
        for online, target in self._pairs:
            if is_continuous(target.tensor):
                averages.append(target.tensor)
                values.append(online.tensor)
            else:
                target.tensor.copy_(online.tensor)
        weight = 1 - self._momentum(trainer)
        follow(averages, values, weight if made is True else weight * made)


def _part(model: nn.Module, part: Part) -> nn.Module:
    if not isinstance(part, str):
        return part(model)
    try:
        return model.get_submodule(part)
    except AttributeError:
        paths = [path for path, _ in model.named_modules() if path and path.count(".") < 2]
        raise ValueError(
            f"a momentum encoder needs parts that the model has, got {part!r}; there are "
            f"{', '.join(paths[:12])}"
        ) from None


def _check_precision(pairs: list[tuple[Place, Place]]) -> None:
    """Check that the target can hold what a small step changes."""
    types = {target.tensor.dtype for _, target in pairs if is_continuous(target.tensor)}
    coarse = sorted(str(dtype) for dtype in types if torch.finfo(dtype).eps > MOST_EPSILON)
    if coarse:
        raise ValueError(
            f"target must be of float32 or finer, got {', '.join(coarse)}: a step of 1 - momentum "
            "would be rounded away; keep the model in float32, and compute in half precision with "
            "precision='bf16'"
        )


def _paired(online: nn.Module, target: nn.Module) -> list[tuple[Place, Place]]:
    """Return the places of what follows what.

    Raises:
        ValueError: if the parts share a tensor, or differ in structure.
    """
    ours, theirs = places(online), places(target)
    if {id(p.tensor) for p in ours.values()} & {id(p.tensor) for p in theirs.values()}:
        raise ValueError(
            "target must be a module of its own, got one that shares tensors with online: make it "
            "with copy.deepcopy"
        )
    other = [k for k in ours if k in theirs and ours[k].tensor.shape != theirs[k].tensor.shape]
    other += [*(ours.keys() ^ theirs.keys())]
    if other:
        raise ValueError(
            "target must have the structure of online, got a difference in "
            f"{', '.join(sorted(other)[:8])}"
        )
    return [(ours[key], theirs[key]) for key in ours]
