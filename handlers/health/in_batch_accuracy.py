"""In-batch accuracy: the share of training pairs that rank first in their own batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch

from diptych.engine.checks import whole_number
from diptych.engine.events import StepEvents
from diptych.engine.handler import Handler
from diptych.engine.trainer import Trainer
from diptych.handlers.health.feature_statistics import (
    name_count,
    negatives_in,
    pair_statistics,
    sides_of,
)


@attrs.define(kw_only=True, eq=False)
class InBatchAccuracy(Handler):
    """Publishes `train/in_batch_accuracy`, an optimistic value: do not compare it with recall.

    It is the share of samples whose own pair is more similar than every non-matching sample of the
    batch, as the mean of both directions; ties count as wrong. It is optimistic because the gallery
    is one batch instead of a test set and the samples are training samples. A smaller batch is
    easier: chance is 1 / B. For the quality of the model use retrieval on held-out pairs
    (`RetrievalRecall` in an `Evaluation`).

    Event: `StepEvents.FORWARD_COMPLETED` every `every` iterations.
    Cost: a product of B x B x D; no synchronisation. In a process group, each rank compares the
        samples of its own batch, and the value is the mean over the samples of all ranks.

    Args:
        every: iterations between two values.
        features: names of two of the task's outputs, [B, D]; None: the first two that end in
            "_features". If `groups` are among the outputs, all samples of one group match.

    Raises:
        ValueError: if `every` is below 1 or `features` are not two names.
        BatchError: while running: if the task's outputs lack them, or they are not [B, D].
    """

    collective: ClassVar[bool] = True

    every: int = attrs.field(default=1, validator=whole_number(of="iterations"))
    features: Sequence[str] | None = attrs.field(default=None, validator=name_count(2))

    def attach(self, trainer: Trainer) -> None:
        """Compare the features of the trainer's batches."""
        trainer.every(self.every, self._publish, StepEvents.FORWARD_COMPLETED)

    @torch.no_grad()
    def _publish(self, trainer: Trainer) -> None:
        outputs = trainer.outputs
        sides = [*sides_of(outputs, self.features, sides=(2,)).values()]
        values = pair_statistics(sides[0], sides[-1], negatives_in(outputs, len(sides[0])))
        # The accuracy of no sample is NaN, and counts for none; a tensor, as on other ranks.
        size = len(sides[0])
        right = values["in_batch_accuracy"].nan_to_num() * size
        trainer.metrics.update_sums({"train/in_batch_accuracy": right}, size)
