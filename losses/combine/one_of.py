"""OneOf: several losses, of which one at a time is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diptych.losses.combine.composite import MultipleLosses, is_sample_mean
from diptych.losses.contrastive.clip import CLIPLoss
from diptych.losses.contrastive.siglip import SigLIPLoss
from diptych.losses.registry import register_loss


@register_loss("one_of")
class OneOf(MultipleLosses):
    """The loss that is active, L_active; the others cost nothing meanwhile.

    For training in stages: all losses are parts from the beginning, so that the optimizer holds
    their parameters and a checkpoint their state, whichever is active. Which one that is, is a
    plain name and no part of the state dict. Range, terms and scalars are those of the parts; the
    terms are named after the active one.

    Across ranks: the active part sees to it; all ranks must have the same one.

    Args:
        losses: The parts by name, or in a sequence, named as they are registered.
        active: The name of the one to begin with; None: the first. May be set at any time.
        inputs: For a part, the positions of the arguments that it takes, as for `WeightedSum`.

    Raises:
        ValueError: If there is no part, or none of the active name, here or when set.
        TypeError: If a part is no ``nn.Module``.
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
        """The name of the part that is taken."""
        return self._active

    @active.setter
    def active(self, name: str) -> None:
        """Take another part."""
        if name not in self.losses:
            raise ValueError(f"active must be one of {', '.join(self.losses)}, got {name!r}")
        self._active = name

    @property
    def couples_samples(self) -> bool:
        """Whether the active part couples samples."""
        return not is_sample_mean(self.losses[self.active])

    def terms(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return the active part's terms, by its name.

        Args:
            *inputs: What the task gives.
        """
        return self.part_terms(self.active, 1.0, *self.inputs_of(self.active, inputs))

    def total_and_weight(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (total, weight) of the active part, if it is a mean over samples.

        Raises:
            TypeError: If the active part couples samples: it is no such mean.
        """
        if self.couples_samples:
            raise TypeError(
                f"the active loss, {self.active!r}, couples samples and is no mean over them; call"
                " forward on the whole batch"
            )
        loss: Any = self.losses[self.active]
        total, weight = loss.total_and_weight(*self.inputs_of(self.active, inputs))
        return total, weight

    @classmethod
    def example(cls) -> OneOf:
        """Return a small instance for the contract test."""
        return cls(losses=(CLIPLoss(), SigLIPLoss()))
