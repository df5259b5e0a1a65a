"""The share of training pairs that are found among their own batch."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from diptych.engine.checks import whole_number
from diptych.engine.events import StepEvents
from diptych.engine.trainer import Trainer
from diptych.handlers.health import representation


@attrs.define(kw_only=True, eq=False)
class InBatchAccuracy:
    """Publishes `train/in_batch_accuracy`, which flatters: never compare it with recall.

    It is the share of samples whose own pair is more similar than every sample of the batch that
    does not match it, the mean of both directions; ties count as wrong. The gallery is one batch
    instead of a test set, the samples are those that the model is trained on, and a smaller batch
    is an easier one: 1 / B is chance. Retrieval on held-out pairs (`RetrievalRecall` in an
    `Evaluation`) says how good the model is.

    Event: `StepEvents.FORWARD_COMPLETED` every `every` iterations.
    Cost: a product of B x B x D; no synchronisation. Over ranks, each looks at its own batch, and
        the value is their mean.

    Args:
        every: iterations between two looks.
        features: names of two of the task's outputs, [B, D]; None: the first two that end in
            "_features". With `groups` among the outputs, everything of one group matches.

    Raises:
        ValueError: if `every` is below 1 or `features` are not two names.
        BatchError: while running: if the task's outputs lack them, or they are not [B, D].
    """

    every: int = attrs.field(default=1, validator=whole_number(of="iterations"))
    features: Sequence[str] | None = None

    def __attrs_post_init__(self) -> None:
        if self.features is not None and (
            isinstance(self.features, str) or len(self.features) != 2
        ):
            raise ValueError(f"features must be two names, got {self.features!r}")

    def attach(self, trainer: Trainer) -> None:
        """Look at the trainer's outputs."""
        trainer.every(self.every, self._look, StepEvents.FORWARD_COMPLETED)

    @torch.no_grad()
    def _look(self, trainer: Trainer) -> None:
        outputs = trainer.outputs
        sides = [*representation.sides_of(outputs, self.features, sides=(2,)).values()]
        negatives = representation.strangers_in(outputs, len(sides[0]))
        values = representation.pairs(sides[0], sides[-1], negatives)
        trainer.metrics.update({"train/in_batch_accuracy": values["in_batch_accuracy"]})
