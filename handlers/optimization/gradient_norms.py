"""The norms of an update's gradients before clipping, for every handler that looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import attrs
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine.distributed.dtensor import norms
from diptych.engine.events import StepEvents
from diptych.engine.trainer import Trainer


@attrs.frozen(eq=False)
class GradientNorms:
    """L2 norms of the gradients of what the optimizer holds, as they are before clipping.

    Attributes:
        parameters: those that have a gradient, in the optimizer's order.
        norms: of the gradient of each of them, scalars on its device.
        missing: parameters that are to be trained and have no gradient.
        total: the norm of all gradients in one vector, a scalar; 0 where there is none.
    """

    parameters: Sequence[nn.Parameter]
    norms: Sequence[Tensor]
    missing: Sequence[nn.Parameter]
    total: Tensor


class SharedNorms:
    """Keeps the norms of an update's gradients, so that onlookers see those before clipping.

    Who attaches first or last does not matter then, and one pass over the gradients serves all.
    """

    def __init__(self) -> None:
        self._kept: GradientNorms | None = None

    def measure(self, trainer: Trainer) -> GradientNorms:
        """Return the norms that were taken in this update, or take them now.

        Nothing waits for the device.
        """
        return self._kept or self.measure_anew(trainer)

    def measure_anew(self, trainer: Trainer) -> GradientNorms:
        """Take the norms now: for who acts on them, after whatever came before."""
        self._kept = _measured(trainer)
        return self._kept

    def forget(self) -> None:
        """Take the norms anew when they are next asked for: who has changed gradients says so."""
        self._kept = None


_SHARED: WeakKeyDictionary[Trainer, SharedNorms] = WeakKeyDictionary()


def shared_norms(trainer: Trainer) -> SharedNorms:
    """Return the one `SharedNorms` of a trainer; call it while attaching."""
    if trainer not in _SHARED:
        shared = _SHARED[trainer] = SharedNorms()
        # Before an update, since the one before it may have failed half way.
        for event in (Events.ITERATION_STARTED, StepEvents.OPTIMIZER_STEPPED):
            trainer.add_event_handler(event, shared.forget)
    return _SHARED[trainer]


def held_parameters(trainer: Trainer) -> list[nn.Parameter]:
    """Return the parameters that the optimizer holds, in its order."""
    return [p for group in trainer.optimizer.param_groups for p in group["params"]]


def norm_of(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the norm of all that these are the norms of; 0 for none."""
    if not parts:
        return torch.zeros((), device=device)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([part.to(device) for part in parts]))
    return norm


def _measured(trainer: Trainer) -> GradientNorms:
    parameters, gradients, missing = [], [], []
    for parameter in held_parameters(trainer):
        if parameter.grad is not None:
            parameters.append(parameter)
            gradients.append(parameter.grad)
        elif parameter.requires_grad:
            missing.append(parameter)
    device = gradients[0].device if gradients else trainer.device
    found = norms(gradients)
    return GradientNorms(parameters, found, missing, norm_of(found, device))
