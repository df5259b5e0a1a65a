"""CompositeLoss: what the losses that are made of losses share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diptych.losses.base.contrastive import total
from diptych.losses.registry import available_losses, get_loss_class


class CompositeLoss(nn.Module):
    """Base of the losses that add up others, their parts.

    A subclass writes `terms` with calls of `part_terms`. A part's terms go by its name: ``clip``
    if it has one term, ``vicreg/variance`` and so on if it has several; so do its scalars,
    ``clip/temperature``. Parts are sub-modules: their parameters and queues are in the state dict
    and a trainer finds their `constrain`.

    Across ranks: each part averages over ranks to its global value, and so does their sum.

    Args:
        losses: The parts by name.

    Attributes:
        losses: The parts by name.

    Raises:
        ValueError: If there is no part.
        TypeError: If a part is no ``nn.Module``.
    """

    def __init__(self, losses: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not losses:
            raise ValueError("losses must hold at least one loss, got none")
        for name, loss in losses.items():
            if not isinstance(loss, nn.Module):
                raise TypeError(
                    f"losses[{name!r}] must be a loss, an nn.Module, got {type(loss).__name__}"
                )
        self.losses = nn.ModuleDict(losses)

    @property
    def couples_samples(self) -> bool:
        """Whether the loss of a batch is no mean over its samples.

        True if a part says so, and whenever there are several parts: means with weights of their
        own (samples here, unmasked tokens there) do not add up to one mean over pieces.
        """
        first, *others = self.losses.values()
        return bool(others) or not is_sample_mean(first)

    @property
    def minimum_batch(self) -> int:
        """The least global batch for which every part is defined."""
        return max(getattr(loss, "minimum_batch", 1) for loss in self.losses.values())

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Return the sum of the terms, a scalar which averages over ranks to the global loss.

        Args:
            *inputs: What `terms` takes.
            **named: What `terms` takes, by name.
        """
        return total(self.terms(*inputs, **named))

    def terms(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """Return the named, weighted parts whose sum is the loss."""
        raise NotImplementedError

    def part_terms(
        self, name: str, weight: float | Tensor, *inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Call a part and return its terms, named after it and times a weight."""
        return weighted_terms(name, self.losses[name], weight, *inputs)

    def scalars(self) -> dict[str, Tensor]:
        """Return the parts' scalars, detached, by the part's name, for logs."""
        return {
            f"{name}/{scalar}": value
            for name, loss in self.losses.items()
            for scalar, value in getattr(loss, "scalars", dict)().items()
        }


def is_sample_mean(loss: nn.Module) -> bool:
    """Say whether a loss is a mean over samples that tells its sum and its weight apart."""
    return not getattr(loss, "couples_samples", True) and hasattr(loss, "total_and_weight")


def weighted_terms(
    name: str, loss: nn.Module, weight: float | Tensor, *inputs: Tensor | None
) -> dict[str, Tensor]:
    """Call a loss and return its terms times a weight: `name` for one, ``name/term`` for several.

    A loss without `terms` has one term, its value.
    """
    named = getattr(loss, "terms", None)
    terms: Mapping[str, Tensor] = {name: loss(*inputs)} if named is None else named(*inputs)
    if len(terms) == 1:
        (value,) = terms.values()
        return {name: weight * value}
    return {f"{name}/{term}": weight * value for term, value in terms.items()}


class MultipleLosses(CompositeLoss):
    """Base of the sums of losses that are given from outside and called on a task's outputs.

    Args:
        losses: The parts by name, or in a sequence, named as they are registered.
        inputs: For a part, the positions of the arguments that it takes; a part that is not named
            takes all.

    Raises:
        ValueError: If there is no part, two parts of a sequence have one name, or `inputs` names
            what is no part.
        TypeError: If a part is no ``nn.Module``.
    """

    exempt: ClassVar[Mapping[str, str]] = {
        "errors": "the parts check what they are called with, in their own words"
    }

    def __init__(
        self,
        losses: Mapping[str, nn.Module] | Sequence[nn.Module],
        inputs: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(losses if isinstance(losses, Mapping) else _named(losses))
        self.inputs = {name: tuple(positions) for name, positions in (inputs or {}).items()}
        unknown = sorted(self.inputs.keys() - self.losses.keys())
        if unknown:
            raise ValueError(f"inputs must name the losses {sorted(self.losses)}, got {unknown}")

    def inputs_of(self, name: str, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return those of the arguments that a part takes.

        Raises:
            ValueError: If the part takes one that is not there.
        """
        positions = self.inputs.get(name)
        if positions is None:
            return tuple(inputs)
        if not set(positions) <= set(range(len(inputs))):
            raise ValueError(
                f"inputs[{name!r}] must be positions of the arguments, 0 to {len(inputs) - 1}, got"
                f" {positions}"
            )
        return tuple(inputs[position] for position in positions)

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return the arguments of one call, those of the first part, for the contract test."""
        first: Any = next(iter(self.losses.values()))
        drawn: tuple[Tensor, ...] = first.example_inputs(batch, dim=dim, generator=generator)
        return drawn


def _named(losses: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Return losses by their registered names; a loss without goes by its class's name."""
    names = {get_loss_class(name): name for name in available_losses()}
    named = {names.get(type(loss), type(loss).__name__): loss for loss in losses}
    if len(named) < len(losses):
        raise ValueError(
            f"losses must have names of their own, got {[type(x).__name__ for x in losses]};"
            " give a mapping from names to losses"
        )
    return named
