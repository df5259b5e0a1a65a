"""Where batches come from: a loader, its iterator, and how far it has come."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from diptych.engine.errors import ResumeError


class BatchSource:
    """Gives the batches of a loader, epoch after epoch, and keeps its place between two runs.

    Attributes:
        data: the loader; None gives `None` as every batch.
    """

    def __init__(self) -> None:
        self.data: Iterable[Any] | None = None
        self._iterator: Iterator[Any] | None = None
        self._restored = False

    @property
    def keeps_its_place(self) -> bool:
        """Whether the next batch is the one after the last, here or from a checkpoint."""
        return self._iterator is not None or self._restored

    def switch(self, data: Iterable[Any] | None) -> None:
        """Take the batches from `data`, from its beginning unless it is the loader in use."""
        if data is not self.data or data is None:
            self.data, self._iterator, self._restored = data, None, False

    def rewind(self) -> None:
        """Begin anew at the next batch."""
        self._iterator, self._restored = None, False

    def next(self, epoch: int, done: int = 0, epoch_length: int | None = None) -> Any:
        """Return the next batch.

        Args:
            epoch: counted from 0, for a loader that orders its samples by it.
            done: batches of the epoch that are done.
            epoch_length: batches of the epoch; more than the loader has are several passes.

        Raises:
            StopIteration: where the pass over the loader ends; the next call begins another.
        """
        if self._iterator is None:
            self._iterator = self._open(epoch, done, epoch_length)
        try:
            return next(self._iterator)
        except StopIteration:
            self.rewind()
            raise
        except BaseException:
            self._after_failure()
            raise

    def _after_failure(self) -> None:
        """Keep the place, if the loader can; a generator is of no use after an exception."""
        position = self.position()
        if position is not None and hasattr(self.data, "load_state_dict"):
            self.restore(position)
        elif inspect.isgenerator(self._iterator):
            self.rewind()

    def _open(self, epoch: int, done: int, epoch_length: int | None) -> Iterator[Any]:
        if self.data is None:
            return itertools.repeat(None)
        if not self._restored:
            length = length_of(self.data)
            if length and epoch_length:  # two passes of one epoch must not repeat one order
                epoch = epoch * -(-epoch_length // length) + done // length
            tell_epoch(self.data, epoch)
        self._restored = False
        return iter(self.data)

    def position(self) -> dict[str, Any] | None:
        """Return the loader's own state after the last batch; None for a loader that has none."""
        state_dict = getattr(self.data, "state_dict", None)
        return None if state_dict is None else dict(state_dict())

    def restore(self, position: Mapping[str, Any]) -> None:
        """Put the loader to a position that `position` returned.

        Raises:
            ResumeError: if the loader cannot go to a position.
        """
        load_state_dict = getattr(self.data, "load_state_dict", None)
        if load_state_dict is None:
            raise ResumeError(
                "a run that stopped inside an epoch needs a loader with load_state_dict(), "
                f"got {type(self.data).__name__}"
            )
        load_state_dict(position)
        self._iterator, self._restored = None, True


def length_of(data: Iterable[Any] | None) -> int | None:
    """Return the number of batches of one pass, or None where the loader does not know."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader over an iterable data set has __len__ and no length
        return None


def tell_epoch(data: Any, epoch: int) -> None:
    """Tell a loader, or the sampler inside it, which epoch comes, counted from 0.

    Without it a distributed sampler repeats one order for ever.
    """
    for owner in (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)):
        set_epoch = getattr(owner, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
            return
