"""Writes checkpoints, at once or in a thread, exports weights, and removes old checkpoints."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import attrs
from torch import Tensor

from diptych.engine.distributed.agreement import on_rank_zero
from diptych.engine.distributed.collectives import rank
from diptych.engine.errors import CheckpointError
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.entries import Entry, Ranking
from diptych.handlers.checkpointing.export import export_weights, exported_from, weights_in
from diptych.handlers.checkpointing.sharded_tensors import (
    LocalShards,
    extract_shards,
    write_shards,
)
from diptych.handlers.run_directory import WEIGHTS

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes one checkpoint at a time, exports the best weights, and removes old checkpoints.

    Args:
        store: the folder.
        ranking: the order of checkpoints by a metric, and how many to keep.
        background: whether a thread writes a copy of the state while the run continues.
        export: whether to write the weights of the best checkpoint (without a metric, of the
            latest) to a file of their own as well.

    Attributes:
        pool: the thread, if there is one.
    """

    def __init__(
        self, store: CheckpointStore, ranking: Ranking, *, background: bool, export: bool
    ) -> None:
        self._store, self._ranking, self._export = store, ranking, export
        self.pool = ThreadPoolExecutor(max_workers=1) if background else None
        self._job: Future[None] | None = None
        self._snapshot: Any = None
        self._written = ""
        self._earlier: list[CheckpointWriter] = []

    def follow(self, earlier: Sequence[CheckpointWriter]) -> None:
        """Write a checkpoint only after those that other writers got before it.

        A state says what the others have saved, so it must not outlive a process that was killed
        before they had saved it. Writers with a thread share one.
        """
        self._earlier = [writer for writer in earlier if writer is not self]
        pools = [writer.pool for writer in earlier if writer.pool is not None]
        if self.pool is not None and pools:
            self.pool = pools[0]

    def submit(self, entry: Entry, state: Mapping[str, Any], group: Any = None) -> None:
        """Write a checkpoint; wait first until the previous one is written.

        If the state is sharded, all ranks call this method, with a process group that nothing else
        uses; else only rank 0 does.

        Raises:
            CheckpointError: if the state cannot be saved at all, or the folder of the shards cannot
                be made.
        """
        self.wait()
        self.log_failure()
        shards: LocalShards = {}
        if group is not None:
            state, shards = extract_shards(state)
            folder = on_rank_zero(partial(self._store.new_folder, entry))
            entry = attrs.evolve(entry, shards=folder)
        kept = (state if rank() == 0 else {}, shards)
        if self.pool is not None:
            kept = self._snapshot = copy_to_host(kept, self._snapshot)
        for writer in self._earlier:
            if self.pool is None or writer.pool is not self.pool:
                writer.wait()
        job = partial(self._write, entry, *kept, group)
        self._job = self.pool.submit(job) if self.pool is not None else _run_now(job)

    def wait(self) -> None:
        """Wait for the last checkpoint without raising its error."""
        if self._job is not None:
            self._job.exception()

    @property
    def exports(self) -> bool:
        """Whether weights are exported."""
        return self._export

    @property
    def idle(self) -> bool:
        """Whether nothing is being written and no outcome remains to be logged."""
        return self._job is None

    def log_failure(self) -> bool:
        """Log the error of the last checkpoint once; return whether there was one."""
        failure = self._failure()
        if failure is not None and rank() == 0:
            logger.error("%s; training continues and earlier checkpoints are intact", failure)
        return failure is not None

    def _failure(self) -> CheckpointError | None:
        """Return the error of the last checkpoint, once, if it has ended with one."""
        if self._job is None or not self._job.done():
            return None
        error, self._job = self._job.exception(), None
        if error is not None and not isinstance(error, CheckpointError):
            raise error
        return error

    def finish(self) -> str:
        """Wait for the last checkpoint; return its file's name, "" before the first.

        Raises:
            CheckpointError: if it could not be written.
        """
        self.wait()
        failure = self._failure()
        if failure is not None:
            raise failure
        return self._written

    def export_if_outdated(self) -> None:
        """Export the best checkpoint's weights if a killed process has not done so."""
        entry = self._to_export(self._store.entries()) if self._export else None
        if entry is None or exported_from(self._store.directory / WEIGHTS) == _source(entry):
            return
        try:
            self._export_weights(entry)
        except CheckpointError as error:
            logger.warning("The weights of %s are not exported: %s", entry.file, error)

    def remove_superfluous(self) -> None:
        """Remove the checkpoints beyond those to keep, if a killed process has not done so.

        If one of those to keep is damaged, all stay.
        """
        try:
            entries = self._store.entries()
            files = self._ranking.superfluous(entries)
            kept = [entry for entry in entries if entry.file not in files]
            if files and all(map(self._store.is_intact, kept)):
                self._store.remove(files)
        except CheckpointError as error:
            logger.warning("%s", error)

    def _write(
        self, entry: Entry, state: Mapping[str, Any], shards: LocalShards, group: Any
    ) -> None:
        if group is not None:
            index = self._write_shards(entry.shards, shards, group)
            if rank() != 0:
                return
            state = {**state, "shards": {"folder": entry.shards, **index}}
        entry = self._store.write(entry, state)
        self._written = entry.file
        entries = self._store.entries()
        if self._export and entry == self._to_export(entries):
            self._export_weights(entry, weights_in(state) if group is None else None)
        self._store.remove(self._ranking.superfluous(entries))

    def _write_shards(self, folder: str, shards: LocalShards, group: Any) -> dict[str, Any]:
        try:
            return write_shards(self._store.directory / folder, shards, group)
        except CheckpointError:
            if rank() == 0:
                self._store.sweep()
            raise

    def _to_export(self, entries: list[Entry]) -> Entry | None:
        best = self._ranking.ranked(entries) if self._ranking.metric else entries[::-1]
        return best[0] if best else None

    def _export_weights(self, entry: Entry, weights: Mapping[str, Any] | None = None) -> None:
        """Write the weights of a checkpoint; read them from it unless they are given."""
        if weights is None:
            weights = self._store.read_weights(entry.file)
        export_weights(weights, self._store.directory / WEIGHTS, source=_source(entry))


def _run_now(job: Callable[[], None]) -> Future[None]:
    """Run a job; keep a CheckpointError as the outcome, as a thread does, and raise any other."""
    done: Future[None] = Future()
    try:
        job()
        done.set_result(None)
    except CheckpointError as error:
        done.set_exception(error)
    return done


def _source(entry: Entry) -> dict[str, str]:
    return {"checkpoint": entry.file, "crc32": str(entry.crc32)}


def copy_to_host(state: Any, previous: Any = None) -> Any:
    """Return a copy of nested containers whose tensors are copies on the host.

    An earlier copy is overwritten where it fits, since allocating memory costs more than the copy.
    """
    if isinstance(state, Tensor):
        if _fits(previous, state):
            return previous.copy_(state.detach())
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        before = previous if isinstance(previous, dict) else {}
        return {key: copy_to_host(value, before.get(key)) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        earlier = previous if isinstance(previous, type(state)) else ()
        pairs = itertools.zip_longest(state, earlier[: len(state)])
        return type(state)(copy_to_host(value, before) for value, before in pairs)
    return state


def _fits(previous: Any, tensor: Tensor) -> bool:
    return (
        isinstance(previous, Tensor)
        and previous.shape == tensor.shape
        and previous.dtype == tensor.dtype
    )
