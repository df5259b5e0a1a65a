"""CompositeLoss and MultipleLosses: bases of the losses that are built from other losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from diptych._loss_arguments import Arguments, arguments_of_parts, misfit, takes, untaken
from diptych.losses.base.loss import Loss, named_calls, sample_mean, with_defaults
from diptych.losses.registry import available_losses, get_loss_class


class CompositeLoss(Loss):
    """Base of the losses that add up other losses, their parts.

    A subclass defines `terms` with calls of `part_terms`. Terms are named after the part: ``clip``
    if it has one term, ``vicreg/variance`` and so on if it has several; so are its scalars,
    ``clip/temperature``. Parts are sub-modules: their parameters and queues are in the state dict,
    and a trainer calls their `constrain`.

    It couples samples even if its parts do not: means with different weights (samples in one part,
    unmasked tokens in another) do not add up to one mean over micro-batches.

    Across ranks: each part averages over ranks to its global value, and so does their sum.

    Args:
        losses: The parts by name.

    Attributes:
        losses: The parts by name.

    Raises:
        ValueError: If there is no part.
        TypeError: If a part is not an ``nn.Module``.
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
    def minimum_batch(self) -> int:
        """The smallest global batch for which every part is defined."""
        return max(with_defaults(loss).minimum_batch for loss in self.losses.values())

    @property
    def negatives_in_batch(self) -> bool:
        """Whether the samples of a batch are one another's negatives in a part."""
        return any(with_defaults(loss).negatives_in_batch for loss in self.losses.values())

    def part_terms(
        self, name: str, weight: float | Tensor, /, *inputs: Tensor | None, **named: Tensor
    ) -> dict[str, Tensor]:
        """Call a part and return its terms times a weight, named after it."""
        return weighted_terms(name, self.losses[name], weight, *inputs, **named)

    def scalars(self) -> dict[str, Tensor]:
        """Return the parts' scalars, detached, named after the parts, for logs."""
        return {
            f"{name}/{scalar}": value
            for name, loss in self.losses.items()
            for scalar, value in with_defaults(loss).scalars().items()
        }


def weighted_terms(
    name: str, loss: nn.Module, weight: float | Tensor, /, *inputs: Tensor | None, **named: Tensor
) -> dict[str, Tensor]:
    """Return a loss's terms times a weight, named `name`, or ``name/term`` if there are several."""
    terms_of = with_defaults(loss).terms
    try:
        terms = terms_of(*inputs, **named)
    except TypeError as error:
        called = getattr(loss, "total_and_weight", getattr(loss, "terms", loss))
        if takes(called, inputs, named):
            raise
        arguments, too_few = misfit(called, len(inputs))
        way_out = (
            "Return the missing ones from the task."
            if too_few
            else f"Pass inputs={{{name!r}: (0, 1)}}, for example."
        )
        raise TypeError(
            f"inputs must give the positions of the outputs for {name!r}, the arguments of"
            f" {arguments}, got {len(inputs)}. {way_out}"
        ) from error
    if len(terms) == 1:
        (value,) = terms.values()
        return {name: weight * value}
    return {f"{name}/{term}": weight * value for term, value in terms.items()}


class MultipleLosses(CompositeLoss):
    """Base of the weighted sums of losses that the user passes in.

    A subclass defines `part_weights`.

    Args:
        losses: The parts by name, or in a sequence, named as they are registered.
        inputs: For a part, the positions of the arguments that it takes; see `WeightedSum`.

    Raises:
        ValueError: If there is no part, two parts of a sequence have one name, or `inputs` names
            an unknown part.
        TypeError: If a part is not an ``nn.Module``.
    """

    exempt: ClassVar[Mapping[str, str]] = {
        "errors": "the parts check their inputs and name their own arguments"
    }

    def __init__(
        self,
        losses: Mapping[str, nn.Module] | Sequence[nn.Module],
        inputs: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(losses if isinstance(losses, Mapping) else _by_name(losses))
        self.inputs = {name: tuple(positions) for name, positions in (inputs or {}).items()}
        unknown = sorted(self.inputs.keys() - self.losses.keys())
        if unknown:
            raise ValueError(f"inputs must name the losses {sorted(self.losses)}, got {unknown}")

    @property
    def parts_called(self) -> list[nn.Module]:
        """The parts, which share the arguments."""
        return [*self.losses.values()]

    def part_weights(self) -> Mapping[str, float | Tensor]:
        """Return the parts to compute, with their weights."""
        raise NotImplementedError

    @property
    def couples_samples(self) -> bool:
        """False if the loss is a single part that is a mean over samples."""
        first, *others = self.part_weights()
        return bool(others) or sample_mean(self.losses[first]) is None

    def terms(self, *inputs: Tensor, **outputs: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the parts, named after them.

        Args:
            *inputs: The outputs of the task.
            **outputs: The same by name, from which each part gets those that it names.
        """
        terms: dict[str, Tensor] = {}
        for name, weight in self.part_weights().items():
            in_order, by_name = self.arguments_of(name, *inputs, **outputs)
            terms |= self.part_terms(name, weight, *in_order, **by_name)
        return terms

    def total_and_weight(self, *inputs: Tensor, **outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weighted total, weight) of a single part that is a mean over samples.

        Args:
            *inputs: The outputs of the task.
            **outputs: The same by name.

        Raises:
            TypeError: If the loss couples samples.
        """
        ((name, factor), *others) = self.part_weights().items()
        part = sample_mean(self.losses[name])
        if part is None or others:
            raise TypeError(
                "total_and_weight needs a single part that is a mean over samples, got"
                f" {', '.join(self.part_weights())}. Call forward on the whole batch."
            )
        in_order, by_name = self.arguments_of(name, *inputs, **outputs)
        total, weight = part.total_and_weight(*in_order, **by_name)
        return factor * total, weight

    def arguments_of(
        self, name: str, /, *inputs: Tensor, **outputs: Tensor
    ) -> tuple[Sequence[Tensor], Mapping[str, Tensor]]:
        """Return the arguments that a part takes, in order and by name.

        Raises:
            TypeError: If no part takes one of the outputs.
            ValueError: If a position in `inputs` is none.
        """
        if name in self.inputs or not outputs:
            return self.inputs_of(name, (*inputs, *outputs.values())), {}
        calls = [named_calls(loss) for loss in self.losses.values()]
        found = arguments_of_parts(tuple(chain(*calls)), tuple(outputs))
        if inputs:
            found = [([], by_name) for _, by_name in found]
        unused = [] if self.inputs else untaken(found, tuple(outputs))
        if unused:
            raise TypeError(
                f"outputs must be arguments of a part, got {', '.join(unused)}, which none of"
                f" {', '.join(self.losses)} takes. Select those of each part with inputs="
            )
        place = list(self.losses).index(name)
        before = sum(map(len, calls[:place]))
        in_order, by_name = self._joined(name, found[before : before + len(calls[place])], outputs)
        return (*inputs, *map(outputs.__getitem__, in_order)), {n: outputs[n] for n in by_name}

    def _joined(
        self, name: str, found: Sequence[Arguments], outputs: Mapping[str, Tensor]
    ) -> tuple[Sequence[str], Sequence[str]]:
        """Return what a part gets; one that holds several gets by name what they get."""
        loss = self.losses[name]
        if not isinstance(loss, MultipleLosses):
            return found[0]
        taken = {*outputs} if loss.inputs else {one for part in found for one in chain(*part)}
        return [], [output for output in outputs if output in taken]

    def inputs_of(self, name: str, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the arguments that a part takes.

        Raises:
            ValueError: If one of them is missing.
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
        """Return the arguments of a call of the first part, for the contract test."""
        first = next(iter(self.losses.values()))
        return with_defaults(first).example_inputs(batch, dim=dim, generator=generator)


def _by_name(losses: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Return losses by their registered names, or by the names of their classes."""
    registered = {get_loss_class(name): name for name in available_losses()}
    named = {registered.get(type(loss), type(loss).__name__): loss for loss in losses}
    if len(named) < len(losses):
        raise ValueError(
            "losses must be of different classes in a sequence, got"
            f" {[type(loss).__name__ for loss in losses]}. Pass a mapping from names to losses."
        )
    return named
