"""A few fixed pairs of images and texts, with the pictures and captions to show for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import attrs
import torch
import torch.nn.functional as F
from ignite.engine import Events
from torch import Tensor

from diptych.engine.errors import BatchError
from diptych.engine.evaluator import Evaluator
from diptych.engine.tasks import NO_LABEL, Outputs, Task
from diptych.engine.trainer import Trainer


class PairFeatures(NamedTuple):
    """Features of unit length, on the host, and their groups; rows of one group match.

    Attributes:
        images: float32 [N, D].
        texts: float32 [M, D].
        image_groups: int64 [N].
        text_groups: int64 [M].
    """

    images: Tensor
    texts: Tensor
    image_groups: Tensor
    text_groups: Tensor


def _check_images(_: Any, __: attrs.Attribute[Tensor], images: object) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not 1 <= images.shape[1] <= 4:
        got = tuple(images.shape) if isinstance(images, Tensor) else repr(images)
        raise ValueError(f"images must be a tensor [N, 1 to 4, H, W], got {got}")


@attrs.frozen(kw_only=True, eq=False)
class PairSamples:
    """Fixed samples to draw: batches for the model, pictures and captions for people.

    A few dozen to a few hundred are enough. All of them stay in memory.

    Args:
        batches: iterated at each drawing, always in the same order. As for `RetrievalRecall`, a
            batch may hold one side only, and samples of one group match.
        images: [N, 1 to 4, H, W], the images of the batches in order, before normalisation: uint8,
            or floats in [0, 1]. Of two channels the first is shown, of four the first three.
        captions: the texts of the batches, in order.
        task: computes the features of a batch; None: the trainer's task.

    Raises:
        ValueError: if `images` has another shape.
    """

    batches: Iterable[Any]
    images: Tensor = attrs.field(validator=_check_images)
    captions: Sequence[str]
    task: Task | None = None

    def features(self, trainer: Trainer) -> PairFeatures:
        """Return the features that the trainer's model currently computes for the samples.

        Raises:
            BatchError: if the task does not return features of both sides, or if their numbers are
                not those of the images and captions.
        """
        outputs: list[Outputs] = []
        evaluator = Evaluator(
            trainer.model,
            task=trainer.task if self.task is None else self.task,
            precision=trainer.settings.precision,
            device=trainer.device,
        )
        evaluator.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output)
        )
        evaluator.evaluate(self.batches)
        images, image_groups = _side(outputs, "image_features", ("groups",))
        texts, text_groups = _side(outputs, "text_features", ("text_groups", "groups"))
        for name, rows, shown in (
            ("images", images, self.images),
            ("captions", texts, self.captions),
        ):
            if len(rows) != len(shown):
                raise BatchError(
                    f"{name} must be those of the batches, {len(rows)} in all, got {len(shown)}. "
                    "Pass one for each sample, in the order of the batches."
                )
        return PairFeatures(images, texts, image_groups, text_groups)


def _side(outputs: Sequence[Outputs], name: str, groups: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the features and groups of one side; a row without one is a group of its own."""
    mine = [output for output in outputs if name in output]
    if not mine:
        there = ", ".join(dict.fromkeys(key for output in outputs for key in output))
        raise BatchError(
            f"the task of samples must return {name}, got {there}. Pass task= to PairSamples."
        )
    features = torch.cat([output[name].float().cpu() for output in mine])
    numbers = torch.cat([_groups(output, groups, len(output[name])) for output in mine])
    if len(numbers) != len(features):
        raise BatchError(
            f"groups must be one for each sample, got {len(features)} samples and {len(numbers)} "
            "groups"
        )
    own = torch.arange(len(features))
    numbers = torch.where(numbers < 0, own if bool((numbers < 0).all()) else own + 2**40, numbers)
    return F.normalize(features, dim=1), numbers


def _groups(output: Outputs, names: Sequence[str], rows: int) -> Tensor:
    """Return the groups of a batch's rows; `NO_LABEL` if it has none."""
    found = next((output[name] for name in names if name in output), None)
    return torch.full((rows,), NO_LABEL) if found is None else found.long().cpu()
