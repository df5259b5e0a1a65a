"""Checks of a run's batches: mistakes whose loss falls as if nothing were wrong."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diptych.engine.containers import leaves
from diptych.engine.data.loader_contract import length_of
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.gathering import gather_values
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.errors import BatchError
from diptych.engine.forward_faults import described
from diptych.engine.step.loss_contract import minimum_batch
from diptych.engine.tasks import NO_LABEL, check_not_logits

logger = logging.getLogger(__name__)


def check_tensors(outputs: Mapping[str, object]) -> None:
    """Check that a task's outputs are tensors.

    Raises:
        BatchError: if one is not.
    """
    for name, value in outputs.items():
        if not isinstance(value, Tensor):
            raise BatchError(
                f"the task's output {name} must be a tensor, got {described(value)}. Convert it, "
                "or leave it out: the loss gets all outputs"
            )


@waits_at("the loss, which gathers features")
def check_first_batch(loss: nn.Module, outputs: Mapping[str, Tensor], batch: object = None) -> None:
    """Check a task's outputs for the first batch; it waits for the device.

    Over ranks it is collective, if samples of a batch are one another's negatives in the loss.

    Raises:
        BatchError: if the outputs are logits where features are expected, or labels are no classes
            of the logits.
    """
    check_not_logits(outputs)
    check_classes(loss, outputs)
    _report_not_finite(outputs, batch)
    _report_unlabelled(loss, outputs)  # each rank has samples of its own
    if getattr(loss, "negatives_in_batch", False) and "negatives" not in outputs:
        size = next((len(value) for value in outputs.values() if value.ndim), 0)
        if sum(gather_values(size)) == 1 and rank() == 0:
            warnings.warn(
                "The first batch has one pair, so that there are no negatives and "
                f"{type(loss).__name__} has nothing to compare it with. Use a larger batch_size; "
                "microbatch_size bounds the memory that it takes.",
                stacklevel=2,
            )


def check_classes(loss: nn.Module, outputs: Mapping[str, Tensor]) -> None:
    """Check that labels are classes of the logits, if the loss is a cross entropy.

    Raises:
        BatchError: if one is not.
    """
    ignored = {getattr(part, "ignore_index", None) for part in loss.modules()} - {None}
    logits, labels = outputs.get("logits"), outputs.get("labels")
    if not ignored or logits is None or labels is None or labels.is_floating_point():
        return
    if labels.shape != logits.shape[:-1]:
        return
    known = labels.long()
    for index in ignored:
        known = known[known != index]
    if known.numel():
        _check_range(int(known.min()), int(known.max()), logits.shape[-1])


def _check_range(low: int, high: int, classes: int) -> None:
    if 0 <= low <= high < classes:
        return
    way_out = "Number the classes from 0, or give the model's last layer as many outputs"
    if low == 1 and high == classes:
        way_out = "Count the classes from 0: labels - 1"
    elif low < 0:
        way_out = f"A sample without a label has {NO_LABEL}"
    raise BatchError(
        f"labels must lie in [0, {classes}), the classes of the logits, got {low} to {high}. "
        f"{way_out}"
    )


def _report_not_finite(outputs: Mapping[str, Tensor], batch: object) -> None:
    wrong = [name for name, value in outputs.items() if not _is_finite(value)]
    if not wrong:
        return
    parts = {repr(key): part for key, part in batch.items()} if isinstance(batch, Mapping) else {}
    if not parts:
        all_parts = batch if isinstance(batch, (tuple, list)) else [batch]
        parts = {f"part {number}": part for number, part in enumerate(all_parts)}
    sources = [name for name, part in parts.items() if not all(map(_is_finite, leaves(part)))]
    cause = "The batch holds none: look at the model's weights, and at its precision."
    if sources:
        cause = f"The batch holds them already, in {', '.join(sources)}: look at the data."
    logger.warning(
        "%s of the first batch hold NaN or infinite values. %s\nLossGuard() skips such batches.",
        ", ".join(wrong),
        cause,
    )


def _is_finite(value: object) -> bool:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return True
    known = value.layout is torch.strided and value.dtype.itemsize > 1  # torch cannot tell others'
    return not known or bool(value.isfinite().all())


def _report_unlabelled(loss: nn.Module, outputs: Mapping[str, Tensor]) -> None:
    for name in ("groups", "labels"):
        ids = outputs.get(name)
        if ids is None or ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != 1:
            continue
        ignored = {getattr(part, "ignore_index", None) for part in loss.modules()}
        if -1 not in ignored and bool((ids.long() == -1).any()):
            warnings.warn(
                f"{name} of the first batch hold -1. Samples without a label or group must have "
                f"{NO_LABEL}, torch's ignore_index: losses with groups take -1 for it, others for "
                "a class.",
                stacklevel=2,
            )


def report_skipped(lacking: str, iteration: int) -> None:
    """Log, on rank 0, that a batch is skipped, with the samples that it lacks."""
    if rank() == 0:
        logger.warning(
            "The batch of iteration %d has fewer samples than %s: it is skipped "
            "(trainer.skipped_batches).",
            iteration,
            lacking,
        )


def last_batch_size(loader: object) -> int | None:
    """Return the samples of a pass's last batch, over all ranks; None if the loader cannot tell.

    It can if it has `batch_size` and `drop_last`, and its sampler or data set has a length.
    """
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    if not isinstance(size, int) or getattr(loader, "drop_last", True):
        return None
    # A sampler has this rank's samples; a loader without one draws from the data set of all ranks.
    samples = length_of(getattr(loader, "dataset", None) if sampler is None else sampler)
    if not samples:
        return None
    return (samples % size or size) * (1 if sampler is None else world_size())


def report_last_batch(loss: nn.Module, loader: object, purpose: str) -> None:
    """Log, on rank 0, that the last batch of a loader will be too small for the loss.

    Nothing is read from the loader. The purpose is what happens to such a batch.
    """
    size, least = last_batch_size(loader), minimum_batch(loss)
    if size is not None and size < least and rank() == 0:
        logger.warning(
            "The last batch of a pass will have %d sample%s, and %s needs %d: %s.\nSet "
            "drop_last=True, or choose another batch_size.",
            size,
            "" if size == 1 else "s",
            type(loss).__name__,
            least,
            purpose,
        )
