"""Loss: the contract between a loss and the code that calls it, with its defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from diptych._argument_names import names_the_right_arguments_of
from diptych._loss_arguments import written
from diptych.losses.base.gather import AnnouncedSizes, world_size


def sum_of_terms(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of a loss's terms."""
    return torch.stack(list(terms.values())).sum() if len(terms) > 1 else next(iter(terms.values()))


class Loss(nn.Module):
    """Base of every loss in this package.

    A trainer, a composite loss and `diptych.losses.contract` read these members. A subclass
    overrides those whose default does not hold, with a plain class attribute or a property. A mean
    over samples defines `total_and_weight` as well, see `SampleMeanTerms`.

    Attributes:
        without_gradient: Names of the inputs that get no gradient by design.
        exempt: Reasons why a check of `diptych.losses.contract` cannot hold, by the check's name.
    """

    without_gradient: ClassVar[tuple[str, ...]] = ()
    exempt: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        names_the_right_arguments_of(cls)

    @property
    def couples_samples(self) -> bool:
        """Whether the loss of a batch is more than a mean over its samples."""
        return True

    @property
    def minimum_batch(self) -> int:
        """The smallest global batch for which the loss is defined."""
        return 1

    @property
    def negatives_in_batch(self) -> bool:
        """Whether all negatives of a sample are other samples of its batch."""
        return False

    @property
    def symmetric(self) -> bool:
        """Whether swapping the first two inputs leaves the value unchanged."""
        return False

    @property
    def can_be_negative(self) -> bool:
        """Whether the value can be below 0."""
        return False

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Return the sum of the terms, a scalar that averages over ranks to the global loss.

        Args:
            *inputs: The arguments of `terms`.
            **named: The arguments of `terms`, by name.
        """
        return sum_of_terms(self.terms(*inputs, **named))

    def terms(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """Return the named, weighted parts whose sum is the loss."""
        raise NotImplementedError(f"{type(self).__name__} must define terms")

    def scalars(self) -> dict[str, Tensor]:
        """Return detached values to publish at log points, by name: a temperature, a weight."""
        return {}

    def announce(self, size: int, kind: int) -> AbstractContextManager[None]:
        """Start to exchange the sizes of all ranks' batches, for the calls inside the context.

        A trainer calls it on all ranks before the forward pass of a batch, so that no call of the
        loss waits for other hosts. Without it a call exchanges the sizes itself.

        Args:
            size: The number of samples of this rank's batch.
            kind: A 64-bit number that is equal for batches of equal structure; see
                `AnnouncedSizes`.
        """
        if world_size() == 1:
            return nullcontext()
        checked = self.__dict__.setdefault("_checked_calls", {})
        return AnnouncedSizes(size, kind, checked)

    @classmethod
    def example(cls) -> Loss:
        """Return a small instance for the contract test. Override it if arguments are required."""
        return cls()

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return the arguments of a call for the contract test; by default two sides [batch, dim].

        Args:
            batch: Number of samples.
            dim: Number of features.
            generator: Source of the random numbers.
        """
        return tuple(torch.randn(batch, dim, generator=generator) for _ in range(2))


class _PlainLoss:
    """A view of a module that is not a `Loss`: members that it lacks have the default of `Loss`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module if hasattr(self._module, name) else _DEFAULTS, name)

    def terms(self, *inputs: Any, **named: Any) -> Mapping[str, Tensor]:
        """Return the module's terms, or its value as the only one."""
        terms = getattr(self._module, "terms", None)
        if terms is None:
            return {"loss": self._module(*inputs, **named)}
        found: Mapping[str, Tensor] = terms(*inputs, **named)
        return found


_DEFAULTS = Loss()


def with_defaults(loss: nn.Module) -> Loss:
    """Return a loss itself; for any other module, a view that adds the defaults of `Loss`."""
    return loss if isinstance(loss, Loss) else cast(Loss, _PlainLoss(loss))


def named_call(loss: nn.Module) -> Callable[..., Any]:
    """Return the method whose arguments have the names of those of the loss."""
    for name in ("total_and_weight", "terms"):
        if hasattr(loss, name):
            return written(getattr(loss, name))
    return written(loss)


def named_calls(loss: nn.Module) -> list[Callable[..., Any]]:
    """Return the `named_call` of a loss; of one that passes its arguments on, those of its parts.

    Such a loss has `parts_called`, the losses that take its arguments.
    """
    parts: Sequence[nn.Module] | None = getattr(loss, "parts_called", None)
    if parts is None:
        return [named_call(loss)]
    return [call for part in parts for call in named_calls(part)]


class SampleMeanTerms(Protocol):
    """A loss that is a weighted mean over samples and can return its sum and its weight."""

    def total_and_weight(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return the weighted sum over these samples and the sum of their weights, 0-dim."""
        ...


def sample_mean(loss: nn.Module) -> SampleMeanTerms | None:
    """Return the loss if it is a mean over samples with a `total_and_weight`, else None."""
    is_mean = hasattr(loss, "total_and_weight") and not with_defaults(loss).couples_samples
    return cast(SampleMeanTerms, loss) if is_mean else None
