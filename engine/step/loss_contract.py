"""The optional members of a loss, and their defaults.

A loss is a module that returns a scalar. These functions are the only code of the engine and the
handlers that asks what else it has: `terms`, `couples_samples`, `total_and_weight`,
`minimum_batch`, `constrain`, `scalars`, `tile`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor, nn

from diptych._loss_arguments import call_with
from diptych.engine.distributed.gathering import gather_values
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import BatchError

Terms = dict[str, Tensor]
"""The named, weighted parts of a loss, whose sum it is."""


class SampleMeanLoss(Protocol):
    """A loss that is a weighted mean over samples, and can return its sum and weight apart.

    The loss of a batch is the sum of the totals of its pieces over the sum of their weights, over
    all ranks.
    """

    def total_and_weight(self, *outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum over the samples and the sum of their weights, scalars."""


class TiledLoss(Protocol):
    """A loss, or a part of one, that computes its matrix in tiles.

    Attributes:
        tile: rows of a tile; None: the whole matrix; "auto": the loss decides.
    """

    tile: int | str | None


def couples_samples(loss: nn.Module, *, default: bool = True) -> bool:
    """Return whether the loss of a sample depends on other samples of the batch.

    Args:
        loss: may declare it in an attribute `couples_samples`.
        default: for a loss that declares nothing. True is safe for a gradient; an evaluation
            averages such a loss over batches, as PyTorch's own losses expect, and takes False.
    """
    return bool(getattr(loss, "couples_samples", default))


def minimum_batch(loss: nn.Module) -> int:
    """Return the smallest global batch for which a loss is defined; 1 if it declares none."""
    return int(optional(loss, "minimum_batch") or 1)


def is_too_small(loss: nn.Module, size: int, announce: Callable[[], object] = lambda: None) -> bool:
    """Return whether a global batch is below the minimum of a loss, alike on all ranks.

    Args:
        loss: collective over ranks if its minimum is above 1.
        size: samples on this rank.
        announce: returns an exchange of the sizes that has started, if there is one.
    """
    least = minimum_batch(loss)
    return least > 1 and _global_size(size, announce()) < least


@waits_at("adding up the sizes of a batch")
def _global_size(size: int, announced: object) -> int:
    total: int | None = getattr(announced, "total", None)
    return sum(gather_values(size)) if total is None else total


def sample_mean_of(loss: nn.Module) -> SampleMeanLoss | None:
    """Return a loss that can return its sum and weight apart, else None.

    From Python 3.12 on, `isinstance` with a runtime protocol misses members that a wrapper forwards
    through `__getattr__`, as a compiled module does.
    """
    return cast(SampleMeanLoss, loss) if hasattr(loss, "total_and_weight") else None


def optional(module: nn.Module, name: str) -> Any:
    """Return a member of a module; None if it has none of that name.

    The look-up that a module adds to Python's own takes microseconds to find nothing.
    """
    kind = type(module)
    if hasattr(kind, name) or kind.__getattr__ is not nn.Module.__getattr__:
        return getattr(module, name, None)
    return vars(module).get(name)


@waits_at("the loss, which gathers features")
def loss_terms(loss: nn.Module, outputs: Mapping[str, Tensor]) -> Terms:
    """Return the named terms whose sum is the loss; `{"loss": value}` if it has no `terms`."""
    terms = optional(loss, "terms")
    if terms is None:
        return {"loss": call_with(loss, outputs)}
    return dict(call_with(terms, outputs))


def sum_of_terms(terms: Terms) -> Tensor:
    """Return the sum of the terms.

    Raises:
        BatchError: if there is no term, or a term is not a scalar.
    """
    shapes = {name: tuple(term.shape) for name, term in terms.items() if term.ndim}
    if shapes or not terms:
        raise BatchError(
            f"loss must return scalars, got {shapes or 'no term'}. Reduce it in the loss."
        )
    return functools.reduce(operator.add, terms.values())


def scalars_of(loss: nn.Module) -> Mapping[str, Tensor]:
    """Return the scalars that a loss publishes at log points, by name: a temperature, a weight."""
    scalars: Callable[[], Mapping[str, Tensor]] | None = getattr(loss, "scalars", None)
    return {} if scalars is None else scalars()


class Constrained(Protocol):
    """A part of a loss that clamps its parameters."""

    def constrain(self) -> None:
        """Clamp the parameters to their bounds."""


def constrained(parts: list[nn.Module]) -> list[Constrained]:
    """Return the parts of a loss that clamp their parameters after an update."""
    # A runtime protocol would cost 10 microseconds a module.
    return [cast(Constrained, part) for part in parts if callable(optional(part, "constrain"))]


def tiled_parts(loss: nn.Module) -> list[TiledLoss]:
    """Return the loss and its parts that compute in tiles."""
    modules: list[Any] = list(loss.modules())
    return [module for module in modules if hasattr(module, "tile")]


def set_tile(loss: nn.Module, tile: int | str | None) -> None:
    """Set the rows of a tile in all tiled parts of a loss."""
    for part in tiled_parts(loss):
        part.tile = tile
