"""L2 norms of an update's gradients before clipping, measured once for all handlers."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor, nn

from diptych.engine.distributed.dtensor import local_parts, norms
from diptych.engine.events import StepEvents
from diptych.engine.modules import named_parameters
from diptych.engine.trainer import Trainer


@attrs.frozen(eq=False)
class GradientNorms:
    """L2 norms of the gradients of the optimizer's parameters, before clipping.

    Attributes:
        parameters: the parameters that have a gradient, in the optimizer's order.
        norms: the norm of each of their gradients, a scalar on the parameter's device.
        missing: the parameters that require a gradient and have none.
        total: the norm of all gradients as one vector, a scalar; 0 if there are none.
    """

    parameters: Sequence[nn.Parameter]
    norms: Sequence[Tensor]
    missing: Sequence[nn.Parameter]
    total: Tensor

    def by_name(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return the norm of each parameter's gradient by name, and "total", on the CPU."""
        named = named_parameters(trainer.model, trainer.loss)
        names = {id(parameter): name for name, parameter in named.items()}
        pairs = zip(self.parameters, self.norms, strict=True)
        each = {names[id(p)]: norm.cpu() for p, norm in pairs if id(p) in names}
        return {**each, "total": self.total.cpu()}


class SharedNorms:
    """A cache of the norms of the running update's gradients, one for each trainer.

    One pass over the gradients serves all handlers, and handlers that only report see the norms
    before clipping in whichever order they are attached.
    """

    def __init__(self) -> None:
        self._cached: GradientNorms | None = None
        self._attempt = 0  # at which they were measured: a failed update is made again

    def attach(self, trainer: Trainer) -> None:
        """Invalidate the cache before the handlers of gradients; a second call does nothing."""
        if not trainer.has_event_handler(self.invalidate, StepEvents.GRADIENTS_READY):
            trainer.add_event_handler(StepEvents.GRADIENTS_READY, self.invalidate)

    def measure(self, trainer: Trainer) -> GradientNorms:
        """Return the norms of this update; measure them if no handler has yet.

        The host does not wait for the device.
        """
        if self._cached is None or self._attempt != trainer.attempts:
            return self.measure_again(trainer)
        return self._cached

    def measure_again(self, trainer: Trainer) -> GradientNorms:
        """Measure the gradients as they are now, and cache the result.

        Call it before acting on gradients that an earlier handler may have changed.
        """
        self._cached, self._attempt = _measure(trainer), trainer.attempts
        return self._cached

    def invalidate(self, *_: object) -> None:
        """Invalidate the cached norms. Call after modifying gradients."""
        self._cached = None


_SHARED: WeakKeyDictionary[Trainer, SharedNorms] = WeakKeyDictionary()


def shared_norms(trainer: Trainer) -> SharedNorms:
    """Return the one `SharedNorms` of a trainer; handlers that use it attach it too."""
    return _SHARED.get(trainer) or _SHARED.setdefault(trainer, SharedNorms())


def held_parameters(trainer: Trainer) -> list[nn.Parameter]:
    """Return the parameters of the trainer's optimizers, in their order."""
    held = [p for one in trainer.optimizers for group in one.param_groups for p in group["params"]]
    return [*dict(zip(map(id, held), held, strict=True)).values()]


def any_gradient(trainer: Trainer) -> bool:
    """Say whether a parameter of the trainer's optimizers has a gradient."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:  # nearly always the first one has
                if parameter.grad is not None:
                    return True
    return False


def scalable(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the memory of the parameters' gradients: this rank's shards, and rows of sparse ones.

    A row of a sparse gradient may be there in several parts, which add up to it.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    return local_parts([g._values() if g.is_sparse else g for g in gradients])  # noqa: SLF001


def norm_of(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the norm of a vector from the norms of its parts; 0 without parts."""
    if not parts:
        return torch.zeros((), device=device)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([part.to(device) for part in parts]))
    return norm


def _measure(trainer: Trainer) -> GradientNorms:
    parameters, gradients, missing = [], [], []
    for parameter in held_parameters(trainer):
        gradient = parameter.grad
        if gradient is not None:
            parameters.append(parameter)
            # The parts of a row add up before its norm is taken.
            gradients.append(gradient.coalesce().values() if gradient.is_sparse else gradient)
        elif parameter.requires_grad:
            missing.append(parameter)
    device = gradients[0].device if gradients else trainer.device
    found = norms(gradients)
    return GradientNorms(parameters, found, missing, norm_of(found, device))
