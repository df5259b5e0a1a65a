"""OneOf: several losses, one of which is active at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from diptych.losses.combine.composite import MultipleLosses
from diptych.losses.contrastive.clip import CLIPLoss
from diptych.losses.contrastive.siglip import SigLIPLoss
from diptych.losses.registry import register_loss


@register_loss("one_of")
class OneOf(MultipleLosses):
    """The active one of several losses, L_active; the others are not computed.

    For training in stages: all losses are parts from the start, so that the optimizer holds their
    parameters and a checkpoint their state, whichever is active. The active name is a plain
    attribute, which a checkpoint of the run holds, not the state dict. Range, terms and scalars are
    those of the parts; the terms are named after the active part.

    Across ranks: the active part communicates; it must be the same on all ranks.

    Args:
        losses: The parts by name, or in a sequence, named as they are registered.
        active: The name of the part to start with; None: the first. May be set at any time.
        inputs: For a part, the positions of the arguments that it takes, as for `WeightedSum`.

    Raises:
        ValueError: If there is no part, or no part of the active name, here or when set.
        TypeError: If a part is not an ``nn.Module``.
    """

    def __init__(
        self,
        *,
        losses: Mapping[str, nn.Module] | Sequence[nn.Module],
        active: str | None = None,
        inputs: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(losses, inputs)
        self.active = next(iter(self.losses)) if active is None else active

    @property
    def active(self) -> str:
        """The name of the active part."""
        return self._active

    @active.setter
    def active(self, name: str) -> None:
        """Activate another part."""
        if name not in self.losses:
            raise ValueError(f"active must be one of {', '.join(self.losses)}, got {name!r}")
        self._active = name

    def part_weights(self) -> Mapping[str, float]:
        """Return the active part, with weight 1."""
        return {self.active: 1.0}

    @classmethod
    def example(cls) -> OneOf:
        """Return a small instance for the contract test."""
        return cls(losses=(CLIPLoss(), SigLIPLoss()))
