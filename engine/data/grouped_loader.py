"""A loader whose batches are joined in groups, so that one update sees several of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from diptych._summaries import Summarized
from diptych.engine.checks import is_whole
from diptych.engine.data.batches import join_batches
from diptych.engine.data.loader_contract import Pass, has_position, length_of, position_getter

_OF_THE_LOADER = ("set_epoch", "generator", "sampler", "batch_sampler")


class _Groups(Summarized):  # checkpoints hold this name
    """Iterates a loader and joins `count` of its batches into one."""

    _shown = ("loader", "count")

    def __init__(self, loader: Any, count: int) -> None:
        self.loader, self.count = loader, count
        self._position: Callable[[], dict[str, Any]] | None = None

    def __len__(self) -> int:
        length = length_of(self.loader)
        if length is None:
            raise TypeError(f"{type(self.loader).__name__} has no length")
        return math.ceil(length / self.count)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        if not has_position(self.loader):
            return self._read(batches, dict, [])
        # If a batch of a group fails, the group is read again: its position is that of its start.
        of_loader = position_getter(batches, self.loader)
        starts: list[dict[str, Any]] = []
        self._position = lambda: dict(starts[0] if starts else of_loader())
        return Pass(self._read(batches, of_loader, starts), self._position)

    def _read(
        self,
        batches: Iterator[Any],
        position: Callable[[], dict[str, Any]],
        starts: list[dict[str, Any]],
    ) -> Iterator[Any]:
        """Yield the groups; `starts` holds the position before a group while it is being read."""
        while True:
            starts.append(position())
            group = list(itertools.islice(batches, self.count))
            starts.clear()
            if not group:
                return
            yield join_batches(group)

    def __getattr__(self, name: str) -> Any:
        # Groups have a position, an epoch and generators if the loader has them.
        if name == "state_dict" and has_position(self.loader):
            return self._position or self.loader.state_dict
        if name == "load_state_dict" and has_position(self.loader):
            return self._go_to
        if name in _OF_THE_LOADER:
            return getattr(self.loader, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _go_to(self, position: Mapping[str, Any]) -> None:
        self._position = None
        self.loader.load_state_dict(position)


def in_groups(loader: Iterable[Any], count: int) -> _Groups:
    """Join every `count` batches of a loader into one, so that one update sees them all.

    The last group of an epoch holds the batches that are left. With `microbatch_size`, a loader of
    small batches makes the update of a large batch.

    Args:
        loader: an iterable of batches of one structure.
        count: batches of a group, >= 1.

    Raises:
        ValueError: if `count` is not a whole number of at least 1.
    """
    if not is_whole(count):
        raise ValueError(f"count must be a whole number of batches >= 1, got {count!r}")
    return _Groups(loader, count)
