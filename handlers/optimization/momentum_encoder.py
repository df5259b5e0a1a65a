"""Momentum encoder: a copy of an encoder that follows it slowly and computes keys or targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import attrs
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine.events import StepEvents
from diptych.engine.handler import Change, Handler
from diptych.engine.modules import unwrapped
from diptych.engine.name_patterns import listed
from diptych.engine.trainer import Trainer
from diptych.handlers.argument_checks import one_of, share_below_one
from diptych.handlers.optimization.horizon import Horizon
from diptych.handlers.optimization.moving_average import (
    ModuleTensor,
    UpdateObserver,
    can_be_averaged,
    differing_keys,
    module_tensors,
    move_towards,
    tensors_of,
)

LARGEST_EPSILON = torch.finfo(torch.float32).eps

Part = str | Callable[[nn.Module], nn.Module]
"""A part of a model: its dotted path, or a function that returns it."""

Pair = tuple[ModuleTensor, ModuleTensor]
"""A tensor of the online part, and the corresponding one of the target."""


@attrs.define(kw_only=True, eq=False)
class MomentumEncoder(Handler):
    """Moves one part of the model slowly towards another, as MoCo and BYOL do.

    The model holds both parts, and the task calls the target without gradient:

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

    When a run starts, the target becomes equal to the online part. After each update
    target = m target + (1 - m) online, for weights and floating-point buffers (the statistics of a
    batch norm); other buffers are copied. m is `momentum` or, with the cosine schedule,
    1 - (1 - momentum) (1 + cos(pi k / K)) / 2 after update k of K, counted from 0. If fp16's scaler
    or a guard skips the update, the target does not change. Attaching this handler sets
    `requires_grad=False` on the target's parameters. Both parts belong to the model, so checkpoints
    contain them, and the target is in train mode with the model, as in MoCo and BYOL. A target that
    you put into eval mode before the run stays there, over evaluations and resumed runs too.

    Every rank applies the same change to the same weights; buffers are those of rank 0, as in
    training.

    Source: He et al. 2020, arXiv:1911.05722; Grill et al. 2020, arXiv:2006.07733, for the cosine.

    Event: `StepEvents.OPTIMIZER_STEPPED`; `Events.STARTED` makes both parts equal.
    Cost: one pass over both parts for each update, with one kernel for each type; no
        synchronisation, and no memory besides the target's. `train/momentum` is published at log
        points.

    Args:
        online: the part that is trained.
        target: the part that follows, with the same structure.
        momentum: m, in [0, 1): 0.999 in MoCo, 0.996 in BYOL; smaller for short runs.
        schedule: "constant", or "cosine" from `momentum` to 1.
        total: K, updates until the cosine ends. Default: those of the run when it first starts,
            which checkpoints keep.

    Raises:
        ValueError: if an argument is out of range; when attached, if the model lacks a part, the
            parts differ in structure, or the target is in half precision; when a run starts, if its
            length is needed and unknown.
    """

    changes: ClassVar[frozenset[Change]] = frozenset(
        {Change.WEIGHTS, Change.BUFFERS, Change.TRAINABLE}
    )

    online: Part = "online"
    target: Part = "target"
    momentum: float = attrs.field(default=0.999, validator=share_below_one)
    schedule: Literal["constant", "cosine"] = attrs.field(
        default="constant", validator=one_of(Literal["constant", "cosine"])
    )
    total: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.ge(1))
    )
    _pairs: list[Pair] = attrs.field(factory=list, init=False, repr=False)
    _updates: UpdateObserver = attrs.field(factory=UpdateObserver, init=False, repr=False)

    _horizon: Horizon = attrs.field(factory=Horizon, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Move the target in the trainer's model after each update."""
        model = unwrapped(trainer.model)
        online, target = (_part(model, path) for path in (self.online, self.target))
        own = {id(part) for part in model.modules()}
        if not {id(online), id(target)} <= own:
            raise ValueError(
                "online and target must be modules of the model, got another one, which no "
                "checkpoint would contain. Register it in the model"
            )
        self._pairs = _paired(online, target)
        _check_precision(self._pairs)
        for parameter in target.parameters():
            parameter.requires_grad_(False)
        self._updates.attach(trainer)
        trainer.metrics.gauge("train/momentum", lambda: self._momentum(trainer))
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, self._update)

    @property
    def role(self) -> str:
        """The target's path."""
        return self.target if isinstance(self.target, str) else ""

    def state_dict(self) -> dict[str, Any]:
        """Return the length of the schedule."""
        return {"total": self._horizon.iterations}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self._horizon.iterations = state_dict["total"]

    def factor(self, update: int, total: int | None) -> float:
        """Return m after an update.

        Args:
            update: k, counted from 0.
            total: K; None if the momentum is constant.
        """
        if self.schedule == "constant" or total is None:
            return self.momentum
        done = min(1.0, update / total)
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * done)) / 2

    def _momentum(self, trainer: Trainer) -> float:
        return self.factor(max(0, trainer.state.iteration - 1), self._horizon.iterations)

    @torch.no_grad()
    def _start(self, trainer: Trainer) -> None:
        if self.schedule == "cosine":
            self._horizon.start(trainer, self.total, "MomentumEncoder", "momentum")
        if self.schedule == "cosine" and self._horizon.iterations is None:
            raise ValueError(
                "a cosine schedule needs the length of the run, got a loader without one. Pass "
                "total to MomentumEncoder, or run with an epoch_length"
            )
        if trainer.state.iteration == 0:
            for value, average in self._tensors():
                average.copy_(value)

    @torch.no_grad()
    def _update(self, trainer: Trainer) -> None:
        made = self._updates.made()
        if made is False:
            return
        averages, values = [], []
        for value, average in self._tensors():
            if can_be_averaged(average):
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        weight = 1 - self._momentum(trainer)
        move_towards(averages, values, weight if made is True else weight * made)

    def _tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the current tensors of online and target, pair by pair."""
        return zip(*(tensors_of(side) for side in zip(*self._pairs, strict=True)), strict=True)


def _part(model: nn.Module, part: Part) -> nn.Module:
    if not isinstance(part, str):
        return part(model)
    try:
        return model.get_submodule(part)
    except AttributeError:
        paths = [path for path, _ in model.named_modules() if path and path.count(".") < 2]
        raise ValueError(
            f"online and target must be parts of the model, got {part!r}; there are "
            f"{listed(paths, 12)}"
        ) from None


def _check_precision(pairs: list[Pair]) -> None:
    """Check that a step of 1 - momentum does not vanish in the target's rounding."""
    types = {target.tensor.dtype for _, target in pairs if can_be_averaged(target.tensor)}
    coarse = sorted(str(dtype) for dtype in types if torch.finfo(dtype).eps > LARGEST_EPSILON)
    if coarse:
        raise ValueError(
            f"target must have at least the precision of float32, got {', '.join(coarse)}: a step "
            "of 1 - momentum would be rounded to 0. Keep the model in float32, and compute in half "
            "precision with precision='bf16'"
        )


def _paired(online: nn.Module, target: nn.Module) -> list[Pair]:
    """Return the pairs of corresponding tensors."""
    pairs = [module_tensors(online), module_tensors(target)]
    ours, theirs = ({key: entry.tensor for key, entry in part.items()} for part in pairs)
    if {id(tensor) for tensor in ours.values()} & {id(tensor) for tensor in theirs.values()}:
        raise ValueError(
            "target must share no tensor with online, got a module that does. Make it with "
            "copy.deepcopy"
        )
    if other := differing_keys(ours, theirs):
        raise ValueError(
            f"target must have the structure of online, got a difference in {other}. Make it with "
            "copy.deepcopy"
        )
    return [(entry, pairs[1][key]) for key, entry in pairs[0].items()]
