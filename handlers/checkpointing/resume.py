"""Where a run begins: with the latest checkpoint that all ranks can read, or from nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diptych.engine.distributed.agreement import on_all_ranks, on_rank_zero
from diptych.engine.errors import CheckpointError
from diptych.handlers.checkpointing.entries import Entry
from diptych.handlers.checkpointing.store import CheckpointStore

logger = logging.getLogger(__name__)


def read_latest(
    store: CheckpointStore, entries: Sequence[Entry], shares: Any = None
) -> tuple[Path, dict[str, Any]] | None:
    """Return the first of the checkpoints that every rank can read; name each that cannot be.

    Args:
        store: the folder.
        entries: the latest first, the same on all ranks.
        shares: as `CheckpointStore.read` takes it.

    Returns:
        The file and the state in it; None where there is no checkpoint.

    Raises:
        CheckpointError: if none can be read, or the folder holds files that it does not list.
    """
    for entry in entries:
        try:
            state = on_all_ranks(partial(store.read, entry.file, shares))
        except CheckpointError as error:
            logger.warning("%s; the one before it is taken", error)
            continue
        return store.directory / entry.file, state
    if entries:
        raise CheckpointError(
            f"none of {len(entries)} checkpoints in {store.directory} can be read: move them away "
            "to start anew"
        )
    on_rank_zero(partial(_refuse_strangers, store))
    return None


def refuse_to_mix(directory: Path, entries: Sequence[Entry]) -> None:
    """Check that a new run's folder is empty.

    Raises:
        CheckpointError: naming a checkpoint in it.
    """
    if entries:
        raise CheckpointError(
            "the directory of a new run must hold no checkpoint, got "
            f"{directory / entries[-1].file}: take another directory, or resume='auto' to continue "
            "that run"
        )


def _refuse_strangers(store: CheckpointStore) -> None:
    strangers = store.strangers()
    if strangers and not store.entries():
        raise CheckpointError(
            f"the manifest of {store.directory} must list {strangers[-1].name}, and does not: "
            f"bring the manifest too, or give resume={str(strangers[-1])!r}"
        )
