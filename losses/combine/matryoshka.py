"""MatryoshkaLoss: one loss on nested prefixes of the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from diptych._loss_arguments import arguments_of
from diptych.losses.base.loss import Loss, named_call, sample_mean, with_defaults
from diptych.losses.base.validation import check_at_least
from diptych.losses.combine.composite import weighted_terms
from diptych.losses.contrastive.clip import CLIPLoss
from diptych.losses.registry import register_loss


@register_loss("matryoshka")
class MatryoshkaLoss(Loss):
    """Sum of one loss over prefixes of the features, so that short embeddings work: sum_m w_m L(m).

    L(m) is the loss on the first m features of every floating argument [B, ..., D]; a loss that
    normalises does so for each prefix. There is one loss module, so its temperature is shared. The
    range is that of the loss. Terms: `dim_64`, or `dim_64/variance` and so on if the loss has
    several. Called with the arguments of the loss.

    It couples samples if the loss does, or if there are several prefixes: each has its own term,
    which a single total cannot express.

    Across ranks: the loss communicates, once for each prefix.

    Source: Kusupati et al. 2022, arXiv:2205.13147.

    Args:
        loss: The loss on each prefix. It cannot be one with a queue, whose keys have one length.
        dims: Lengths of the prefixes, increasing, >= 1. Include the full length if it should count.
        weights: A number >= 0 for each prefix; None: 1.

    Raises:
        ValueError: If lengths do not increase, weights are < 0 or not as many, or (when called)
            features are shorter than the longest prefix.
        TypeError: If `loss` is not an ``nn.Module``.
    """

    exempt: ClassVar[Mapping[str, str]] = {
        "errors": "the loss checks its inputs and names its own arguments"
    }

    def __init__(
        self, *, loss: nn.Module, dims: Sequence[int], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            is_class = isinstance(loss, type)
            way_out = f". Make an instance: {loss.__name__}(...)" if is_class else ""
            raise TypeError(f"loss must be an nn.Module, got {type(loss).__name__}{way_out}")
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
    def parts_called(self) -> list[nn.Module]:
        """The loss, which takes the arguments."""
        return [self.loss]

    @property
    def couples_samples(self) -> bool:
        """False for a single prefix of a loss that is a mean over samples."""
        return len(self.weights) > 1 or sample_mean(self.loss) is None

    @property
    def minimum_batch(self) -> int:
        """The smallest global batch for which the loss is defined."""
        return with_defaults(self.loss).minimum_batch

    @property
    def negatives_in_batch(self) -> bool:
        """Whether all negatives of a sample are other samples of its batch, in the loss."""
        return with_defaults(self.loss).negatives_in_batch

    @property
    def symmetric(self) -> bool:
        """Whether swapping the first two inputs leaves the value unchanged."""
        return with_defaults(self.loss).symmetric

    def terms(self, *inputs: Tensor, **outputs: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the loss on each prefix.

        Args:
            *inputs: The arguments of the loss.
            **outputs: The outputs of the task, from which the loss gets its arguments.
        """
        terms: dict[str, Tensor] = {}
        for dim, weight in self.weights.items():
            in_order, by_name = self._prefixes(dim, *inputs, **outputs)
            terms |= weighted_terms(f"dim_{dim}", self.loss, weight, *in_order, **by_name)
        return terms

    def total_and_weight(self, *inputs: Tensor, **outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (weighted total, weight) for a single prefix of a mean over samples.

        Raises:
            TypeError: If the loss couples samples.
        """
        ((dim, factor), *others) = self.weights.items()
        mean = sample_mean(self.loss)
        if mean is None or others:
            raise TypeError(
                "total_and_weight needs a single prefix of a mean over samples, got dims"
                f" {tuple(self.weights)} of {type(self.loss).__name__}."
                " Call forward on the whole batch."
            )
        in_order, by_name = self._prefixes(dim, *inputs, **outputs)
        total, weight = mean.total_and_weight(*in_order, **by_name)
        return factor * total, weight

    def scalars(self) -> dict[str, Tensor]:
        """Return the scalars of the loss."""
        return with_defaults(self.loss).scalars()

    def _prefixes(
        self, dim: int, /, *inputs: Tensor, **outputs: Tensor
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the arguments of the loss, with the first `dim` features of each floating one."""
        in_order, by_name = list(inputs), list(outputs)
        if outputs and not inputs:
            names, by_name = arguments_of(named_call(self.loss), tuple(outputs))
            in_order = [outputs[name] for name in names]
        prefixes = {name: self._prefix(outputs[name], dim) for name in by_name}
        return [self._prefix(x, dim) for x in in_order], prefixes

    def _prefix(self, features: Tensor, dim: int) -> Tensor:
        if features is None or not features.is_floating_point() or features.dim() < 2:
            return features
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
        """Return the arguments of a call of the loss, for the contract test."""
        return with_defaults(self.loss).example_inputs(batch, dim=dim, generator=generator)
