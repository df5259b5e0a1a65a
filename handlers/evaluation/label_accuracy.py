"""Accuracy: top-k, over all samples or for each class, of samples that have a label."""

from __future__ import annotations

from typing import Literal

import torch
from ignite.exceptions import NotComputableError
from torch import Tensor

from diptych.engine.checks import is_whole
from diptych.engine.distributed.collectives import all_reduce_sum
from diptych.engine.distributed.gathering import gather_values
from diptych.engine.errors import BatchError
from diptych.handlers.evaluation.known_ids import KnownIds
from diptych.handlers.evaluation.outputs_metric import (
    Outputs,
    OutputsMetric,
    OutputTransform,
    check_ids,
    unchanged,
)

Average = Literal["samples", "classes"] | None


class LabelAccuracy(OutputsMetric):
    """The base of metrics that compare the scores of classes with labels.

    A subclass calls `count` with the scores and labels of a batch. Arguments and values are those
    of `ClassificationAccuracy`.

    Args:
        top: as in `ClassificationAccuracy`.
        average: as in `ClassificationAccuracy`.
        output_transform: from the evaluator's output to the mapping that the subclass takes.
    """

    def __init__(
        self,
        *,
        top: int = 1,
        average: Average = "samples",
        output_transform: OutputTransform = unchanged,
    ) -> None:
        if not is_whole(top):
            raise ValueError(f"top must be a whole number >= 1, got {top!r}")
        if average not in {"samples", "classes", None}:
            raise ValueError(f"average must be 'samples', 'classes' or None, got {average!r}")
        self.top, self.average = top, average
        super().__init__(output_transform)

    def reset(self) -> None:
        """Forget the batches so far."""
        self._known: KnownIds | None = None
        self._counts: Tensor | None = None

    @torch.no_grad()
    def count(self, scores: Tensor, labels: Tensor) -> None:
        """Count the samples of each class, and those that are classified correctly.

        Scores are [B, C], and labels int64 [B].
        """
        classes = scores.shape[1]
        if self._known is None or self._counts is None:
            self._known = KnownIds("labels", classes)
            self._counts = torch.zeros(2, classes, dtype=torch.int64, device=scores.device)
        known = self._known.mask(labels)
        best = scores.topk(min(self.top, classes)).indices
        # A class is the best of NaNs too, by chance the right one.
        correct = (best == labels[:, None]).any(1) & ~scores.isnan().any(1)
        counts = torch.stack([correct & known, known]).long()
        self._counts.index_add_(1, labels.clamp(0, classes - 1), counts)

    @torch.no_grad()
    def compute(self) -> float | Tensor:
        """Return the accuracy over all samples of all ranks; a tensor [C] if `average` is None."""
        if self._known is not None:
            self._known.report(type(self).__name__)
        classes = max(gather_values(0 if self._counts is None else self._counts.shape[1]))
        counts = torch.zeros(2, classes, dtype=torch.int64, device=self._device)
        if self._counts is not None:
            counts = self._counts
        correct, seen = all_reduce_sum(counts).double()
        if not bool(seen.any()):
            raise NotComputableError(
                f"{type(self).__name__} needs at least one sample with a label, got none"
            )
        by_class: Tensor = correct / seen
        if self.average is None:
            return by_class
        if self.average == "classes":
            return float(by_class[seen > 0].mean())
        return float(correct.sum() / seen.sum())


class ClassificationAccuracy(LabelAccuracy):
    """Accuracy of `logits` [B, C] for `labels` [B]: top-k, over samples or for each class.

    ```python
    Evaluation(loader, metrics={"top5": ClassificationAccuracy(top=5)})
    ```

    Unlike Ignite's `Accuracy`, it leaves out samples without a label, -100. A label that is no
    class is left out too, and logged as an error when the value is computed. A sample with NaN
    among its logits is wrong.

    Event: Ignite's for metrics.
    Cost: the `top` largest of C logits for each sample; no synchronisation until the end.

    Args:
        top: a sample is correct if its label is among the `top` highest scores, >= 1.
        average: "samples": the share of correct samples. "classes": the mean of the shares of the
            classes that have samples, the balanced accuracy. None: the share of each class, a
            tensor [C] in `trainer.state.metrics`, NaN for a class without samples.
        output_transform: from the evaluator's output to a mapping with `logits` and `labels`.

    Raises:
        ValueError: if an argument is out of range.
        BatchError: while running: if the mapping lacks logits or labels, or they do not fit.
        NotComputableError: if it has seen no samples with a label.
    """

    @torch.no_grad()
    def update(self, output: Outputs) -> None:
        """Add a batch.

        Args:
            output: `logits` [B, C] and integer `labels` [B].
        """
        logits, labels = output.get("logits"), output.get("labels")
        if logits is None or logits.ndim != 2:
            got = "none" if logits is None else f"shape {tuple(logits.shape)}"
            raise BatchError(
                f"logits must be [B, C], got {got} among {', '.join(output) or 'nothing'}. Use "
                "output_transform to name logits and labels"
            )
        check_ids("labels", labels, len(logits))
        assert labels is not None
        self.count(logits.detach(), labels.detach().to(logits.device, torch.int64))
