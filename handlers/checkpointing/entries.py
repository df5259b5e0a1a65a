"""The entries of a manifest: where a run continues, which checkpoints are best, which are kept."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from diptych.handlers.argument_checks import Mode
from diptych.handlers.contained_paths import check_name

SUFFIX = ".pt"
SHARDS = ".shards"
AGAIN = "_again.pt"
"""The suffix of a checkpoint's second name. A checkpoint that is saved again gets the name that its
earlier file does not have, so that the earlier file stays intact until the new one is listed."""
_STEM = r"checkpoint_epoch_-?[0-9]{1,20}(_iteration_[0-9]{1,20})?"
FILE = re.compile(rf"{_STEM}(_again)?\.pt")
"""The names of checkpoints."""
FOLDER = re.compile(rf"{_STEM}\.shards(_[0-9]{{1,20}})?")
"""The names of the folders of sharded tensors."""


@attrs.frozen(kw_only=True)
class Entry:
    """A checkpoint, as the manifest lists it.

    Attributes:
        file: the name of the file in the folder.
        epoch: epochs that had started.
        iteration: updates that were done.
        metrics: the values that it was saved with.
        score: the value by which it is ranked, or None.
        scored_by: the metric of that value, or None.
        resumable: whether a run can continue from it.
        by_hand: whether `save_checkpoint` saved it; such a checkpoint is never removed.
        completed: at the end of a finished run, whether the handlers of `COMPLETED` have ended;
            None elsewhere.
        size: bytes of the file.
        crc32: the checksum of the file.
        shards: the folder of the sharded tensors; "" if no tensor is sharded.
    """

    file: str
    epoch: int
    iteration: int
    metrics: dict[str, float]
    score: float | None = None
    scored_by: str | None = None
    resumable: bool = True
    by_hand: bool = False
    completed: bool | None = None
    size: int = 0
    crc32: int = 0
    shards: str = ""

    @property
    def name(self) -> str:
        """The plain name of the checkpoint, whichever of its two names the file has."""
        return self.file.replace(AGAIN, SUFFIX)

    @property
    def names(self) -> set[str]:
        """The names of its file and folder."""
        return {self.file, self.shards} - {""}

    def renamed(self) -> Entry:
        """Return the entry with the other name of its file."""
        return attrs.evolve(self, file=self.file.removesuffix(SUFFIX) + AGAIN)


def entry_from(listed: Mapping[str, Any]) -> Entry:
    """Return an entry as a manifest lists it; ignore the fields of a newer version.

    Raises:
        TypeError, ValueError: if a field is missing, or has a value that no checkpoint has.
    """
    known = attrs.fields_dict(Entry)
    given = {key: value for key, value in listed.items() if key in known}
    for key, value in given.items():
        numbers = value.values() if isinstance(value, dict) else ()
        if type(value) not in _TYPES[key] or not {*map(type, numbers)} <= {int, float}:
            raise ValueError(f"{key} has a value that it cannot have: {value!r:.100}")
    entry = Entry(**given)
    check_name(entry.file, FILE)
    if entry.shards:
        check_name(entry.shards, FOLDER)
    return entry


def check_distinct(entries: Iterable[Entry]) -> None:
    """Check that no two checkpoints share a file or folder: removing one would damage the other.

    Raises:
        ValueError: naming the file or folder.
    """
    counts = Counter(name for entry in entries for name in (entry.file, entry.shards) if name)
    name, count = max(counts.items(), key=lambda pair: pair[1], default=("", 0))
    if count > 1:
        raise ValueError(f"{name} is listed {count} times")


_TYPES: dict[str, tuple[type, ...]] = {
    "file": (str,),
    "epoch": (int,),
    "iteration": (int,),
    "metrics": (dict,),
    "score": (int, float, type(None)),
    "scored_by": (str, type(None)),
    "resumable": (bool,),
    "by_hand": (bool,),
    "completed": (bool, type(None)),
    "size": (int,),
    "crc32": (int,),
    "shards": (str,),
}
"""The types of each field of an entry that was read from a file."""


def with_entry(entries: Iterable[Entry], entry: Entry) -> list[Entry]:
    """Return the entries with a new one, which replaces an entry of its name.

    A run that saves an earlier iteration than the folder holds has gone back: no run continues from
    the later checkpoints any more.
    """
    kept: list[Entry] = []
    for other in entries:
        if other.name == entry.name:
            entry = attrs.evolve(entry, by_hand=entry.by_hand or other.by_hand)
            if entry.score is None and other.iteration == entry.iteration:  # the same weights
                entry = attrs.evolve(entry, score=other.score, scored_by=other.scored_by)
        elif other.iteration > entry.iteration and not entry.by_hand:
            kept.append(attrs.evolve(other, resumable=False))
        else:
            kept.append(other)
    return [*kept, entry]


def resumable_entries(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries from which a run can continue, the latest first."""
    able = [entry for entry in entries if entry.resumable]
    return sorted(able, key=lambda entry: entry.iteration)[::-1]


@attrs.frozen
class Ranking:
    """The order of checkpoints by a metric, and how many of them to keep.

    Attributes:
        metric: the metric that ranks them; None: keep the latest ones.
        mode: whether a larger or a smaller value is better.
        keep: the number of checkpoints to keep.
    """

    metric: str | None
    mode: Mode
    keep: int

    def ranked(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return the entries with a score, the best first; of equal scores, the earlier first.

        An entry whose score is NaN or belongs to another metric is left out.
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
        """Return the files of the checkpoints to remove.

        Four are never removed: one that was saved by hand, the one written last, the one to
        continue from, and one that another metric has ranked.
        """
        own = [entry for entry in entries if not entry.by_hand]
        by_time = resumable_entries(own)
        best = self.ranked(own) if self.metric is not None else by_time
        kept = {entry.file for entry in (*best[: self.keep], *by_time[:1], *own[-1:])}
        removable = [entry for entry in own if entry.scored_by in {None, self.metric}]
        return {entry.file for entry in removable} - kept
