"""What a folder's manifest says of its checkpoints: where a run goes on, which are the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import attrs

AGAIN = "_again.pt"
"""Ends the file's name where a checkpoint of the plain name stands while it is written anew."""


@attrs.frozen(kw_only=True)
class Entry:
    """A checkpoint, as the manifest lists it.

    Attributes:
        file: its name in the folder.
        epoch: epochs that were started.
        iteration: updates that were made.
        metrics: the values that it was saved with.
        score: the value that it is ranked by, or None.
        scored_by: the metric of that value, or None.
        resumable: whether a run can go on from it.
        by_hand: whether it was asked for, and so is never removed.
        size: bytes.
        crc32: of the file: enough to tell a damaged one.
        shards: the folder of what is sharded, "" where nothing is; the file says what is in it.
    """

    file: str
    epoch: int
    iteration: int
    metrics: dict[str, float]
    score: float | None = None
    scored_by: str | None = None
    resumable: bool = True
    by_hand: bool = False
    size: int = 0
    crc32: int = 0
    shards: str = ""

    @property
    def name(self) -> str:
        """What it is called, whichever of its two names its file has."""
        return self.file.replace(AGAIN, ".pt")

    @property
    def names(self) -> set[str]:
        """What belongs to it in the folder."""
        return {self.file, self.shards} - {""}


def entry_from(listed: Mapping[str, Any]) -> Entry:
    """Return an entry as a manifest holds it; what a newer version says besides is passed over."""
    known = attrs.fields_dict(Entry)
    return Entry(**{key: value for key, value in listed.items() if key in known})


def added(entries: Iterable[Entry], entry: Entry) -> list[Entry]:
    """Return the entries with a new one, which replaces that of its name.

    A run that saves an earlier iteration than the folder holds has gone back: what lies ahead of
    it is of a future that it has left, and no run goes on from there.
    """
    kept: list[Entry] = []
    for other in entries:
        if other.name == entry.name:
            entry = attrs.evolve(entry, by_hand=entry.by_hand or other.by_hand)
        elif other.iteration > entry.iteration and not entry.by_hand:
            kept.append(attrs.evolve(other, resumable=False))
        else:
            kept.append(other)
    return [*kept, entry]


def resumable(entries: Iterable[Entry]) -> list[Entry]:
    """Return those that a run can go on from, the latest first."""
    able = [entry for entry in entries if entry.resumable]
    return sorted(able, key=lambda entry: entry.iteration)[::-1]


@attrs.frozen
class Ranking:
    """Which checkpoints are the best, and which are kept.

    Attributes:
        metric: what they are ranked by; None: the latest are kept.
        mode: whether a larger or a smaller value is better.
        keep: how many.
    """

    metric: str | None
    mode: Literal["max", "min"]
    keep: int

    def ranked(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return those with a value of the metric, the best first, the earlier first where equal.

        NaN is no value; nor is one of another metric, by which the folder was ranked before.
        """
        sign = -1 if self.mode == "max" else 1
        scored = [
            (sign * entry.score, entry)
            for entry in entries
            if entry.scored_by == self.metric
            and entry.score is not None
            and not math.isnan(entry.score)
        ]
        return [entry for _, entry in sorted(scored, key=lambda pair: (pair[0], pair[1].iteration))]

    def superfluous(self, entries: Iterable[Entry]) -> set[str]:
        """Return the files that nobody needs any more.

        Never one that was saved by hand, the last to be written, the one to go on from, or one
        that another metric has ranked.
        """
        own = [entry for entry in entries if not entry.by_hand]
        by_time = resumable(own)
        best = self.ranked(own) if self.metric is not None else by_time
        kept = {entry.file for entry in (*best[: self.keep], *by_time[:1], *own[-1:])}
        mine = [entry for entry in own if entry.scored_by in {None, self.metric}]
        return {entry.file for entry in mine} - kept
