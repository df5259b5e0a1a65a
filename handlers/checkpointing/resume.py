"""The start of a run: from the latest readable checkpoint, or from iteration 0."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diptych.engine.distributed.agreement import on_all_ranks, on_rank_zero
from diptych.engine.errors import CheckpointError
from diptych.engine.trainer import Trainer
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.entries import Entry

logger = logging.getLogger(__name__)


def read_latest(
    store: CheckpointStore, entries: Sequence[Entry], group: Any = None
) -> tuple[Path, dict[str, Any]] | None:
    """Return the latest checkpoint that every rank can read; log each that cannot be read.

    Args:
        store: the folder.
        entries: the checkpoints, the latest first, the same on all ranks.
        group: as in `CheckpointStore.read`.

    Returns:
        The file and the state in it; None if there is no checkpoint.

    Raises:
        CheckpointError: if there are checkpoints and none can be read, or the folder holds
            checkpoints and no manifest lists them.
    """
    for entry in entries:
        try:
            state = on_all_ranks(partial(store.read, entry.file, group))
        except CheckpointError as error:
            logger.warning("%s; trying the checkpoint before it", error)
            continue
        return store.directory / entry.file, state
    if entries:
        raise CheckpointError(
            f"none of {len(entries)} checkpoints in {store.directory} can be read. Move them away "
            "to start a new run."
        )
    on_rank_zero(partial(_check_manifest_lists_files, store))
    return None


def check_is_empty(directory: Path, entries: Sequence[Entry]) -> None:
    """Check that the directory of a new run holds no checkpoints.

    Raises:
        CheckpointError: naming a checkpoint in it.
    """
    if entries:
        raise CheckpointError(
            "directory must hold no checkpoint if resume is None, got "
            f"{directory / entries[-1].file}. Use another directory, or resume='auto' to continue "
            "that run."
        )


def _check_manifest_lists_files(store: CheckpointStore) -> None:
    unlisted = store.unlisted()
    if unlisted and not store.entries():
        raise CheckpointError(
            f"the manifest of {store.directory} must list {unlisted[-1].name}, and does not. "
            f"Copy the manifest too, or use resume={str(unlisted[-1])!r}."
        )


def position_is_lost(trainer: Trainer) -> bool:
    """Return whether no run can resume here: inside an epoch, with a loader without positions."""
    return trainer.inside_epoch and not trainer.batches.has_positions


def resume_limits(trainer: Trainer, *, epochs_only: bool) -> str | None:
    """Return a warning if the loader limits where the run can resume, else None.

    Args:
        trainer: the trainer whose run starts.
        epochs_only: whether it is saved only at the end of epochs.
    """
    data, epoch = trainer.state.dataloader, trainer.state.epoch_length
    if trainer.batches.has_positions or data is None:
        return None
    length = trainer.batches.pass_length
    reason = f"{type(data).__name__} cannot go to a position, so the run can be resumed"
    if epoch is not None and (length is None or epoch % length):
        batches = f"of {length} batches" if length else "of unknown length"
        return f"{reason} only where an epoch of {epoch} iterations ends with a pass {batches}"
    return None if epochs_only else f"{reason} only at the end of each epoch"
