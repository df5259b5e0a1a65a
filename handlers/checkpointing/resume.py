"""The start of a run: the newest checkpoint of its managers, and the checks of its loader."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import attrs

from diptych.engine.distributed.agreement import on_all_ranks, on_rank_zero
from diptych.engine.errors import CheckpointError
from diptych.engine.loop.position import Phase
from diptych.engine.trainer import Trainer
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.entries import Entry, resumable_entries

logger = logging.getLogger(__name__)


class StartPoint(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        path: the file.
        state: the state in it.
        completed: as in its `Entry`; None if no manifest lists it.
    """

    path: Path
    state: dict[str, Any]
    completed: bool | None


@attrs.frozen
class Source:
    """A directory from which a run may continue.

    Attributes:
        store: the directory.
        resume: the argument of its manager.
        entries: its checkpoints, the same on all ranks.
    """

    store: CheckpointStore
    resume: Path | str | None
    entries: Sequence[Entry]

    @property
    def path(self) -> Path | None:
        """The checkpoint that `resume` names, if it names one."""
        if self.resume in {None, "auto"}:
            return None
        return self.store.directory / str(self.resume)

    @property
    def goes_back(self) -> bool:
        """Whether `resume` names a checkpoint of the directory itself."""
        return self.path is not None and self.path.parent == self.store.directory


def find_start(sources: Sequence[Source], group: Any = None) -> StartPoint | None:
    """Return the checkpoint from which a run starts, read on all ranks; None for a new run.

    A path in a manager's own directory comes first, then the newest checkpoint of all directories
    that every rank can read, then the path of another run's checkpoint.

    Raises:
        CheckpointError: if a directory whose `resume` is None holds checkpoints; two managers name
            different checkpoints; or there are checkpoints, and none can be read.
    """
    for source in sources:
        if source.resume is None:
            check_is_empty(source.store.directory, source.entries)
    back = _agreed([source for source in sources if source.goes_back])
    if back is not None:
        return read_start(back, group)
    candidates = _newest_first(sources)
    other = _agreed([source for source in sources if source.path is not None])
    if not candidates and other is not None:
        return read_start(other, group)
    return _read_newest(sources, candidates, group)


def read_start(path: Path, group: Any = None) -> StartPoint:
    """Read a checkpoint on all ranks.

    Raises:
        CheckpointError: if it cannot be read on one of them.
    """
    if path.is_symlink():  # its shards and its checksum are where it points to
        path = path.resolve()
    store = CheckpointStore(path.parent)
    listed = (e for e in on_rank_zero(store.entries) if path.name in {e.name, e.file})
    entry = next(listed, None)
    state = on_all_ranks(partial(store.read, path.name, group))
    return StartPoint(path, state, None if entry is None else entry.completed)


def _agreed(sources: Sequence[Source]) -> Path | None:
    """Return the checkpoint that sources name, if there are any."""
    paths = {str(source.path): source.path for source in sources}
    if len(paths) > 1:
        raise CheckpointError(
            "resume must name one checkpoint for all managers of a trainer, got "
            f"{' and '.join(sorted(paths))}. A run can start from one of them; use resume='auto' "
            "for the others"
        )
    return next(iter(paths.values()), None)


def _newest_first(sources: Sequence[Source]) -> list[tuple[CheckpointStore, Entry]]:
    """Return the checkpoints of all sources from which a run can continue, the newest first.

    Of one iteration, one whose run has completed comes first, then that of the last source: where
    several managers save at one point, the later one's state knows of the earlier one's save.
    """
    ordered = [
        (entry.iteration, entry.completed is True, rank, -place, (source.store, entry))
        for rank, source in enumerate(sources)
        for place, entry in enumerate(resumable_entries(source.entries))
    ]
    return [pair for *_, pair in sorted(ordered, key=lambda found: found[:-1], reverse=True)]


def _read_newest(
    sources: Sequence[Source], candidates: Sequence[tuple[CheckpointStore, Entry]], group: Any
) -> StartPoint | None:
    """Return the newest checkpoint that every rank can read; log each that cannot be read."""
    for store, entry in candidates:
        try:
            state = on_all_ranks(partial(store.read, entry.file, group))
        except CheckpointError as error:
            logger.warning("%s; trying the checkpoint before it", error)
            continue
        return StartPoint(store.directory / entry.file, state, entry.completed)
    if candidates:
        folders = sorted({str(store.directory) for store, _ in candidates})
        raise CheckpointError(
            f"none of {len(candidates)} checkpoints in {' and '.join(folders)} can be read. Move "
            "them away to start a new run."
        )
    for source in sources:
        if source.resume is not None:
            on_rank_zero(partial(_check_manifest_lists_files, source.store))
    return None


def _check_manifest_lists_files(store: CheckpointStore) -> None:
    unlisted = store.unlisted()
    if unlisted and not store.entries():
        raise CheckpointError(
            f"the manifest of {store.directory} must list {unlisted[-1].name}, and does not. "
            f"Copy the manifest too, or use resume={str(unlisted[-1])!r}."
        )


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


def position_is_lost(trainer: Trainer) -> bool:
    """Return whether no run can resume here.

    That is so inside an epoch, if the loader has no positions or has given a batch that no step has
    taken: its position is behind that batch.
    """
    has_batch = trainer.position.phase is Phase.BEFORE_STEP
    return has_batch or (trainer.inside_epoch and not trainer.batches.has_positions)


def resume_limits(trainer: Trainer, *, epochs_only: bool) -> str | None:
    """Return a warning if the loader limits where the run can resume, else None."""
    data, epoch = trainer.state.dataloader, trainer.state.epoch_length
    if trainer.batches.has_positions or data is None:
        return None
    length = trainer.batches.pass_length
    reason = f"{type(data).__name__} cannot go to a position, so the run can be resumed"
    if trainer.counts_iterations and epoch and (length is None or epoch % length):
        batches = f"of {length} batches" if length else "of unknown length"
        return f"{reason} only where an epoch of {epoch} iterations ends with a pass {batches}"
    return None if epochs_only else f"{reason} only at the end of each epoch"
