"""CrossEntropyLoss: classification and next-token prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.losses.base.supervised import BaseSupervisedLoss
from diptych.losses.base.validation import (
    check_floating,
    check_fraction,
    check_integers,
    working_dtype,
)
from diptych.losses.registry import register_loss


def check_classification(logits: Tensor, labels: Tensor) -> None:
    """Raise unless logits are floating point [B, ..., C] and labels integers [B, ...]."""
    check_floating("logits", logits)
    if logits.dim() < 2:
        raise ValueError(f"logits must be [batch, ..., classes], got shape {tuple(logits.shape)}")
    expected = logits.shape[:-1]
    if isinstance(labels, Tensor) and labels.shape == logits.shape:
        raise TypeError(
            f"labels must be one class number a sample, {tuple(expected)}, got {labels.dtype}"
            f" {tuple(labels.shape)}. One-hot labels become numbers by labels.argmax(-1); two sides"
            " of features are for a contrastive loss, such as CLIPLoss."
        )
    check_integers("labels", labels)
    if labels.shape != expected:
        is_column = labels.dim() == logits.dim() and labels.shape[-1] == 1
        way_out = "Pass labels.squeeze(-1)." if is_column else "Put the classes last."
        raise ValueError(
            "labels must have the logits' shape without the classes,"
            f" {tuple(expected)}, got {tuple(labels.shape)}. {way_out}"
        )


@register_loss("cross_entropy")
class CrossEntropyLoss(BaseSupervisedLoss):
    """Cross entropy of logits against class labels, with label smoothing and class weights.

    ``F.cross_entropy``: the mean of -log softmax(logits)[label], weighted by the label's class
    weight, over the labels that are not ignored. It is >= 0, about ln C at chance, and 0 (not NaN)
    if every label is ignored.

    Called ``loss(logits, labels)`` with logits [B, ..., C], classes last, and labels [B, ...]:
    [B, T, C] and [B, T] for tokens.

    Across ranks: nothing is gathered; totals are divided by the sum of all ranks' weights, so that
    each rank counts by its number of unmasked tokens.

    Source: Szegedy et al. 2015, arXiv:1512.00567, for label smoothing.

    Args:
        label_smoothing: In [0, 1).
        weight: A weight >= 0 for each class, [C]; None: 1.
        ignore_index: The label of samples or tokens that do not count.

    Raises:
        ValueError: If an argument is out of range.
    """

    name = "cross_entropy"
    weight: Tensor | None

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        check_fraction("label_smoothing", label_smoothing)
        if weight is not None and (weight.dim() != 1 or bool((weight < 0).any())):
            raise ValueError("weight must hold a number >= 0 for each class, [C]")
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.register_buffer("weight", weight, persistent=False)

    def total_and_weight(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (sum of the weighted cross entropies, sum of the weights)."""
        check_classification(logits, labels)
        classes = logits.shape[-1]
        logits = logits.to(working_dtype(logits)).reshape(-1, classes)
        labels = labels.reshape(-1).long()
        weight = None if self.weight is None else self.weight.to(logits.dtype)
        with torch.autocast(logits.device.type, enabled=False):
            try:
                total = F.cross_entropy(
                    logits,
                    labels,
                    weight=weight,
                    ignore_index=self.ignore_index,
                    reduction="sum",
                    label_smoothing=self.label_smoothing,
                )
            except IndexError as error:  # only on the CPU
                raise IndexError(
                    f"labels must lie in [0, {classes}), the classes of the logits, or be"
                    f" {self.ignore_index}, got {int(labels.min())} to {int(labels.max())}. Number"
                    " the classes from 0, or let the model return as many logits."
                ) from error
        counted = labels != self.ignore_index
        if weight is None:
            return total, counted.sum().to(logits.dtype)
        return total, (weight[labels.masked_fill(~counted, 0)] * counted).sum()
