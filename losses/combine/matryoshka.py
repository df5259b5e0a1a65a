"""MatryoshkaLoss: one loss on nested prefixes of the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diptych.losses.base.contrastive import total
from diptych.losses.base.validation import check_at_least
from diptych.losses.combine.composite import is_sample_mean, weighted_terms
from diptych.losses.contrastive.clip import CLIPLoss
from diptych.losses.registry import register_loss


@register_loss("matryoshka")
class MatryoshkaLoss(nn.Module):
    """Sum of one loss over prefixes of the features, so that short embeddings work: sum_m w_m L(m).

    L(m) is the loss on the first m features of every floating argument [B, ..., D]; a loss that
    normalises does so for each prefix again. The loss is one module: its temperature is shared. Its
    range is the loss's. Terms: `dim_64`, or `dim_64/variance` and so on if the loss has several.

    Called as the loss is.

    Across ranks: the loss sees to it, once for each prefix.

    Source: Kusupati et al. 2022, arXiv:2205.13147.

    Args:
        loss: The loss on each prefix. One with a queue, whose keys have one length, does not fit.
        dims: Lengths of the prefixes, increasing, >= 1; the whole length is not added by itself.
        weights: A number >= 0 for each prefix; None: 1.

    Raises:
        ValueError: If lengths do not increase, weights are not as many or < 0, or (when called)
            features are shorter than the longest prefix.
        TypeError: If `loss` is no ``nn.Module``.
    """

    exempt: ClassVar[Mapping[str, str]] = {
        "errors": "the loss checks what it is called with, in its own words"
    }

    def __init__(
        self, *, loss: nn.Module, dims: Sequence[int], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss must be an nn.Module, got {type(loss).__name__}")
        dims = tuple(dims)
        if not dims or dims[0] < 1 or list(dims) != sorted(set(dims)):
            raise ValueError(f"dims must increase from at least 1, got {dims}")
        weights = [1.0] * len(dims) if weights is None else weights
        if len(weights) != len(dims):
            raise ValueError(f"weights must be as many as dims, {len(dims)}, got {len(weights)}")
        for dim, weight in zip(dims, weights, strict=True):
            check_at_least(f"the weight of dim {dim}", weight, 0)
        self.loss = loss
        self.weights = {dim: float(weight) for dim, weight in zip(dims, weights, strict=True)}

    @property
    def couples_samples(self) -> bool:
        """Whether the loss of a batch is no mean over its samples.

        True if the loss on each prefix says so, and whenever there are several prefixes: each has a
        term of its own, which the sum of all does not tell.
        """
        return len(self.weights) > 1 or not is_sample_mean(self.loss)

    @property
    def minimum_batch(self) -> int:
        """The least global batch for which the loss is defined."""
        return int(getattr(self.loss, "minimum_batch", 1))

    @property
    def symmetric(self) -> bool:
        """Whether swapping the first two arguments leaves the value."""
        return bool(getattr(self.loss, "symmetric", False))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the sum over prefixes, a scalar which averages over ranks to the global loss.

        Args:
            *inputs: What the loss takes.
        """
        return total(self.terms(*inputs))

    def terms(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return the loss's terms on each prefix, weighted. Arguments as for `forward`."""
        terms: dict[str, Tensor] = {}
        for dim, weight in self.weights.items():
            terms |= weighted_terms(f"dim_{dim}", self.loss, weight, *self._prefixes(inputs, dim))
        return terms

    def total_and_weight(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weighted total, weight) of a single prefix, if the loss is a mean over samples.

        Raises:
            TypeError: If it couples samples: it is no such mean.
        """
        if self.couples_samples:
            raise TypeError(
                "a loss on several prefixes, or one that couples samples, is no mean over samples;"
                " call forward on the whole batch"
            )
        ((dim, factor),) = self.weights.items()
        loss: Any = self.loss
        total, weight = loss.total_and_weight(*self._prefixes(inputs, dim))
        return factor * total, weight

    def scalars(self) -> dict[str, Tensor]:
        """Return the loss's scalars."""
        scalars: dict[str, Tensor] = getattr(self.loss, "scalars", dict)()
        return scalars

    def _prefixes(self, inputs: Sequence[Tensor], dim: int) -> list[Tensor]:
        """Return the arguments with the first `dim` features of each floating one."""
        return [
            self._prefix(x, dim) if x is not None and x.is_floating_point() and x.dim() > 1 else x
            for x in inputs
        ]

    def _prefix(self, features: Tensor, dim: int) -> Tensor:
        if features.shape[-1] < dim:
            raise ValueError(
                f"dims must be at most the number of features, {features.shape[-1]}, got"
                f" {tuple(self.weights)}"
            )
        return features[..., :dim]

    @classmethod
    def example(cls) -> MatryoshkaLoss:
        """Return a small instance for the contract test."""
        return cls(loss=CLIPLoss(), dims=(2, 4, 8))

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return the arguments of one call of the loss, for the contract test."""
        loss: Any = self.loss
        drawn: tuple[Tensor, ...] = loss.example_inputs(batch, dim=dim, generator=generator)
        return drawn
