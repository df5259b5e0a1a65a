"""Moving averages of a module's weights: its tensors by name, and whether an update was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor, nn

from diptych.engine.distributed.dtensor import local_parts
from diptych.engine.events import StepEvents
from diptych.engine.modules import unwrapped
from diptych.engine.name_patterns import listed
from diptych.engine.state.module_state import clean_state_dict
from diptych.engine.trainer import Trainer
from diptych.handlers.optimization.gradient_norms import any_gradient

DTYPE = attrgetter("dtype")


class ModuleTensor(NamedTuple):
    """A parameter or buffer, by the module that owns it.

    Attributes:
        module: the owner.
        name: the attribute's name.
        is_buffer: whether it is a buffer.
    """

    module: nn.Module
    name: str
    is_buffer: bool

    @property
    def tensor(self) -> Tensor:
        """The current tensor; a module may replace a buffer by another tensor."""
        return tensors_of([self])[0]


def tensors_of(entries: Iterable[ModuleTensor]) -> list[Tensor]:
    """Return the current tensors of entries; torch's own look-up is slow."""
    found: list[tuple[ModuleTensor, Tensor | None]] = [
        (one, (one.module._buffers if one.is_buffer else one.module._parameters).get(one.name))  # noqa: SLF001
        for one in entries
    ]
    return [getattr(one.module, one.name) if held is None else held for one, held in found]


def module_tensors(module: nn.Module) -> dict[str, ModuleTensor]:
    """Return a module's parameters and persistent buffers, by their keys in its state dict.

    A shared tensor is listed once, under its first key.
    """
    kept, found, seen = clean_state_dict(module).keys(), {}, set()
    for path, part in unwrapped(module).named_modules():
        own = [(name, False) for name, _ in part.named_parameters(recurse=False)]
        own += [(name, True) for name, _ in part.named_buffers(recurse=False)]
        for name, is_buffer in own:
            entry = ModuleTensor(part, name, is_buffer)
            key = f"{path}.{name}".lstrip(".").replace("_orig_mod.", "")
            if key in kept and id(entry.tensor) not in seen:
                seen.add(id(entry.tensor))
                found[key] = entry
    return found


def differing_keys(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> str:
    """Return the keys that only one mapping has or whose shapes differ, eight at most, as text."""
    shapes = [{key: value.shape for key, value in part.items()} for part in (first, second)]
    return listed(sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()}))


def can_be_averaged(tensor: Tensor) -> bool:
    """Return whether a tensor can be averaged; integers are counts, whose mean is no count."""
    return tensor.is_floating_point() or tensor.is_complex()


@torch.no_grad()
def move_towards(averages: list[Tensor], values: list[Tensor], weight: float | Tensor) -> None:
    """Move averages towards values, in place: average += weight * (value - average).

    Args:
        averages: tensors on the devices of the values.
        values: as many tensors of the same shapes; converted to the types of the averages.
        weight: a number in [0, 1], or a 0-dim tensor if only the device knows it.
    """
    if not averages:
        return
    averages, values = local_parts(averages), local_parts(values)
    if [*map(DTYPE, values)] != [*map(DTYPE, averages)]:
        values = [v.to(a.dtype) for a, v in zip(averages, values, strict=True)]
    if not isinstance(weight, Tensor):
        torch._foreach_lerp_(averages, values, weight)
        return
    steps = torch._foreach_sub(values, averages)  # noqa: SLF001
    torch._foreach_mul_(steps, weight)
    torch._foreach_add_(averages, steps)


@attrs.define(eq=False)
class UpdateObserver:
    """Observes whether the optimizer has made the last update or skipped it.

    fp16's scaler skips an update if a gradient is not finite. A guard removes all gradients, or
    makes a fused optimizer skip the update on the device. The host waits for none of that.
    """

    _trainer: Trainer | None = attrs.field(default=None, init=False, repr=False)
    _skipped: Tensor | None = attrs.field(default=None, init=False, repr=False)
    _found: Tensor | None = attrs.field(default=None, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Observe the trainer's optimizer."""
        self._trainer = trainer
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, self._remember)
        # A guard sets the optimizer's flag in its own pre-hook and removes it in its post-hook:
        # which of these two hooks sees the flag depends on which handler was attached first.
        trainer.optimizer.register_step_pre_hook(self._read_flag)
        trainer.optimizer.register_step_post_hook(self._read_flag)

    def made(self) -> Tensor | bool:
        """Return whether the last update was made; call it at `StepEvents.OPTIMIZER_STEPPED`.

        Returns:
            True or False, or a 0-dim tensor of 1.0 or 0.0 if only the device knows.
        """
        trainer = self._trainer
        assert trainer is not None
        if not any_gradient(trainer):
            return False
        flags = [] if self._found is None else [self._found.to(trainer.device) > 0]
        if self._skipped is not None:
            flags.append(trainer.skipped_steps > self._skipped)
        return 1.0 - torch.stack(flags).any().float() if flags else True

    def _remember(self, trainer: Trainer) -> None:
        self._found = None
        self._skipped = None if trainer.scaler is None else trainer.skipped_steps.clone()

    def _read_flag(self, optimizer: Any, *_: Any) -> None:
        found = getattr(optimizer, "found_inf", None)
        if found is not None:
            self._found = found.detach().reshape(())
