"""Checks of a run's batches: mistakes whose loss falls as if nothing were wrong."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diptych.engine.data.loader_contract import last_batch_size
from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.gathering import gather_values
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import BatchError
from diptych.engine.step.loss_contract import minimum_batch
from diptych.engine.tasks import NO_LABEL

logger = logging.getLogger(__name__)


@waits_at("the loss, which gathers features")
def check_first_batch(loss: nn.Module, outputs: Mapping[str, Tensor]) -> None:
    """Check a task's outputs for the first batch; it waits for the device.

    Over ranks it is collective, if samples of a batch are one another's negatives in the loss.

    Raises:
        BatchError: if the outputs are logits where features are expected.
    """
    check_not_logits(outputs)
    if rank() == 0:
        _report_unlabelled(loss, outputs)
    if getattr(loss, "negatives_in_batch", False):
        size = next((len(value) for value in outputs.values() if value.ndim), 0)
        if sum(gather_values(size)) == 1 and rank() == 0:
            warnings.warn(
                "The first batch has one pair, so that there are no negatives and "
                f"{type(loss).__name__} has nothing to compare it with. Use a larger batch_size; "
                "microbatch_size bounds the memory that it takes.",
                stacklevel=2,
            )


def check_not_logits(outputs: Mapping[str, Tensor]) -> None:
    """Check that the first two outputs are not a matrix of logits and its transpose.

    Raises:
        BatchError: if they are, as those of OpenAI's CLIP: `logits_per_image`, `logits_per_text`.
    """
    names = list(outputs)[:2]
    if len(names) < 2 or not _are_square(one := outputs[names[0]], other := outputs[names[1]]):
        return
    size = one.shape[1]  # with micro-batches, the matrices of one after the other
    one, other = one[:size], other[:size]
    near = 4 * torch.finfo(one.dtype).eps * one.abs().max()
    if (one - other.T).abs().max() <= near < (one - other).abs().max():
        raise BatchError(
            f"{' and '.join(names)} must be features [B, D], got logits [{size}, {size}], each the "
            "transpose of the other. Let the model return features, such as (encode_image(image), "
            "encode_text(text)), in its forward or in a task of your own"
        )


def _are_square(one: Tensor, other: Tensor) -> bool:
    """Return whether two outputs of one shape begin with a square matrix of real numbers."""
    alike = one.shape == other.shape and one.dtype == other.dtype and one.is_floating_point()
    return alike and one.ndim == 2 and 1 < one.shape[1] <= len(one)


def _report_unlabelled(loss: nn.Module, outputs: Mapping[str, Tensor]) -> None:
    for name in ("groups", "labels"):
        ids = outputs.get(name)
        if ids is None or ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != 1:
            continue
        ignored = {getattr(part, "ignore_index", None) for part in loss.modules()}
        if -1 not in ignored and bool((ids == -1).any()):
            warnings.warn(
                f"{name} of the first batch hold -1. Samples without a label or group must have "
                f"{NO_LABEL}, torch's ignore_index: losses with groups take -1 for it, others for "
                "a class.",
                stacklevel=2,
            )


def report_last_batch(loss: nn.Module, loader: object, purpose: str) -> None:
    """Log, on rank 0, that the last batch of a loader will be too small for the loss.

    Args:
        loss: the loss.
        loader: any; nothing is read from it.
        purpose: what happens to such a batch, for the message.
    """
    size, least = last_batch_size(loader), minimum_batch(loss)
    if size is not None and size < least and rank() == 0:
        logger.warning(
            "The last batch of a pass will have %d sample%s, and %s needs %d: %s. Set "
            "drop_last=True, or choose another batch_size.",
            size,
            "" if size == 1 else "s",
            type(loss).__name__,
            least,
            purpose,
        )
