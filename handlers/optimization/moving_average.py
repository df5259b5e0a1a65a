"""What weight averages share: where a module keeps its tensors, and which updates were made."""

from __future__ import annotations

from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, nn

from diptych.engine.distributed.dtensor import local_parts
from diptych.engine.events import StepEvents
from diptych.engine.modules import unwrapped
from diptych.engine.state.module_state import clean_state_dict
from diptych.engine.trainer import Trainer


class Place(NamedTuple):
    """Where a module keeps a parameter or a buffer.

    Attributes:
        module: the part that owns it.
        name: its name there.
        is_buffer: whether it is a buffer.
    """

    module: nn.Module
    name: str
    is_buffer: bool

    @property
    def tensor(self) -> Tensor:
        """What is there now: a module may replace a buffer by another tensor."""
        found: Tensor = getattr(self.module, self.name)
        return found


def places(module: nn.Module) -> dict[str, Place]:
    """Return the places of a module's parameters and buffers, by their keys in its state.

    What is shared is there once, under its first key; a buffer that no checkpoint holds is left
    out.
    """
    kept, found, seen = clean_state_dict(module).keys(), {}, set()
    for path, part in unwrapped(module).named_modules():
        own = [(name, False) for name, _ in part.named_parameters(recurse=False)]
        own += [(name, True) for name, _ in part.named_buffers(recurse=False)]
        for name, is_buffer in own:
            place = Place(part, name, is_buffer)
            key = f"{path}.{name}".lstrip(".").replace("_orig_mod.", "")
            if key in kept and id(place.tensor) not in seen:
                seen.add(id(place.tensor))
                found[key] = place
    return found


def is_continuous(tensor: Tensor) -> bool:
    """Say whether a mean of such tensors means anything: a count has none."""
    return tensor.is_floating_point() or tensor.is_complex()


@torch.no_grad()
def follow(averages: list[Tensor], values: list[Tensor], weight: float | Tensor) -> None:
    """Move averages towards values, in place: average += weight * (value - average).

    Args:
        averages: on the values' device.
        values: as many, of the same shapes; converted to the averages' types.
        weight: in [0, 1]; a 0-dim tensor where the device decides.
    """
    if not averages:
        return
    averages, values = local_parts(averages), local_parts(values)
    values = [v.to(a.dtype) for a, v in zip(averages, values, strict=True)]
    if not isinstance(weight, Tensor):
        torch._foreach_lerp_(averages, values, weight)
        return
    steps = torch._foreach_sub(values, averages)  # noqa: SLF001
    torch._foreach_mul_(steps, weight)
    torch._foreach_add_(averages, steps)


@attrs.define(eq=False)
class MadeUpdates:
    """Tells at `StepEvents.OPTIMIZER_STEPPED` whether the optimizer has made the update.

    fp16's scaler leaves one out where a gradient is not finite, and a guard takes the gradients
    away or, on the device, tells a fused optimizer to leave it out. None of that is waited for.
    """

    _trainer: Trainer | None = attrs.field(default=None, init=False, repr=False)
    _skipped: Tensor | None = attrs.field(default=None, init=False, repr=False)
    _found: Tensor | None = attrs.field(default=None, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Watch the trainer's optimizer."""
        self._trainer = trainer
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, self._remember)
        # A guard's flag is there from its own hook before the step to the one after it: which of
        # these two sees it depends on who was attached first.
        trainer.optimizer.register_step_pre_hook(self._look)
        trainer.optimizer.register_step_post_hook(self._look)

    def last(self) -> Tensor | bool:
        """Return whether the last update was made; 0-dim, 1.0 or 0.0, where the device decides."""
        trainer = self._trainer
        assert trainer is not None
        held = (p for group in trainer.optimizer.param_groups for p in group["params"])
        if all(parameter.grad is None for parameter in held):
            return False
        flags = [] if self._found is None else [self._found.to(trainer.device) > 0]
        if self._skipped is not None:
            flags.append(trainer.skipped_steps > self._skipped)
        return 1.0 - torch.stack(flags).any().float() if flags else True

    def _remember(self, trainer: Trainer) -> None:
        self._found = None
        self._skipped = None if trainer.scaler is None else trainer.skipped_steps.clone()

    def _look(self, optimizer: Any, *_: Any) -> None:
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            self._found = found.detach().reshape(())
