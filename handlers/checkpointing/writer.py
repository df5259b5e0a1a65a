"""Puts checkpoints on the disk, at once or while the run goes on, and keeps the folder tidy."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import attrs

from diptych.engine.distributed.agreement import on_rank_zero
from diptych.engine.distributed.collectives import rank
from diptych.engine.errors import CheckpointError
from diptych.handlers.checkpointing.background_writer import BackgroundWriter, snapshot
from diptych.handlers.checkpointing.entries import Entry, Ranking
from diptych.handlers.checkpointing.export import export_weights, exported_from
from diptych.handlers.checkpointing.sharded_files import Shares, take_out, write_shares
from diptych.handlers.checkpointing.store import CheckpointStore

logger = logging.getLogger(__name__)

EXPORT = "model.safetensors"


class CheckpointWriter:
    """Writes a checkpoint, exports its weights where they are the best, removes what nobody needs.

    Args:
        store: the folder.
        ranking: which checkpoints are the best, and which are kept.
        background: whether a thread writes a copy of the state while the run goes on.
        export: whether the best checkpoint's weights (without a metric, the last one's) are
            written on their own as well.
    """

    def __init__(
        self, store: CheckpointStore, ranking: Ranking, *, background: bool, export: bool
    ) -> None:
        self._store, self._ranking, self._export = store, ranking, export
        self._background = background
        self._jobs = BackgroundWriter(in_thread=background)
        self._snapshot: Any = None
        self._written = ""

    def submit(self, entry: Entry, state: Mapping[str, Any], ranks: Any = None) -> None:
        """Write a checkpoint, after the one before it.

        Args:
            entry: of it.
            state: of the run.
            ranks: their group for this alone, where parts of the state are sharded; then all of
                them call this. Otherwise rank 0 does.

        Raises:
            CheckpointError: if the state cannot be saved at all, or, where it is sharded, the
                folder cannot be made.
        """
        self.wait()
        self.tell_failure()
        shares: Shares = {}
        if ranks is not None:
            state, shares = take_out(state)
            folder = on_rank_zero(partial(self._store.new_folder, entry))
            entry = attrs.evolve(entry, shards=folder)
        kept = (state if rank() == 0 else {}, shares)
        if self._background:
            kept = self._snapshot = snapshot(kept, self._snapshot)
        self._jobs.submit(partial(self._write, entry, *kept, ranks))

    def wait(self) -> None:
        """Wait for the last checkpoint, without raising its error."""
        self._jobs.wait()

    @property
    def idle(self) -> bool:
        """Whether nothing is being written and nothing remains to be told."""
        return self._jobs.idle

    def tell_failure(self) -> bool:
        """Log the error of the last checkpoint, once, if it has ended with one; say whether."""
        failure = self._jobs.failure()
        if failure is not None and rank() == 0:
            logger.error("%s; the run goes on, and the checkpoints before it stand", failure)
        return failure is not None

    def end(self) -> str:
        """Wait for the last checkpoint; return its file's name, "" before the first.

        Raises:
            CheckpointError: if it could not be written.
        """
        self.wait()
        failure = self._jobs.failure()
        if failure is not None:
            raise failure
        return self._written

    def export_what_a_kill_left_out(self) -> None:
        """Export the best checkpoint's weights where the exported ones are another's."""
        entry = self._to_export(self._store.entries()) if self._export else None
        if entry is None or exported_from(self._store.directory / EXPORT) == _source(entry):
            return
        try:
            self._export_weights(entry)
        except CheckpointError as error:
            logger.warning("%s; its weights are not exported", error)

    def _write(self, entry: Entry, state: Mapping[str, Any], shares: Shares, ranks: Any) -> None:
        if ranks is not None:
            held = self._write_shares(entry.shards, shares, ranks)
            if rank() != 0:
                return
            state = {**state, "shards": {"folder": entry.shards, **held}}
        entry = self._store.write(entry, state)
        self._written = entry.file
        entries = self._store.entries()
        if self._export and entry == self._to_export(entries):
            self._export_weights(entry, None if ranks else state["model"])
        self._store.remove(self._ranking.superfluous(entries))

    def _write_shares(self, folder: str, shares: Shares, ranks: Any) -> dict[str, Any]:
        try:
            return write_shares(self._store.unfinished(folder), shares, ranks)
        except CheckpointError:
            if rank() == 0:
                self._store.discard(folder)
            raise

    def _to_export(self, entries: list[Entry]) -> Entry | None:
        best = self._ranking.ranked(entries) if self._ranking.metric else entries[::-1]
        return best[0] if best else None

    def _export_weights(self, entry: Entry, weights: Mapping[str, Any] | None = None) -> None:
        """Write the weights of a checkpoint, read from it where they are not given."""
        if weights is None:
            weights = self._store.read_weights(entry.file)
        export_weights(weights, self._store.directory / EXPORT, source=_source(entry))


def _source(entry: Entry) -> dict[str, str]:
    return {"checkpoint": entry.file, "crc32": str(entry.crc32)}
