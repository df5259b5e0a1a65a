"""Where batches come from: a loader, its iterator, and how far it has come."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch

from diptych.engine.errors import ResumeError
from diptych.engine.random_state import random_state, set_random_state


class Pass:
    """One pass over a loader, which knows where it stands, whoever else reads that loader.

    Args:
        batches: of the pass.
        position: returns what the loader's `load_state_dict` takes.
    """

    def __init__(self, batches: Iterator[Any], position: Callable[[], dict[str, Any]]) -> None:
        self._batches, self.position = batches, position

    def __iter__(self) -> Pass:
        return self

    def __next__(self) -> Any:
        return next(self._batches)


class BatchSource:
    """Gives the batches of a loader, epoch after epoch, and keeps its place between two runs.

    Attributes:
        data: the loader; None gives `None` as every batch.
    """

    def __init__(self) -> None:
        self.data: Iterable[Any] | None = None
        self._iterator: Iterator[Any] | None = None
        self._restored = False
        self._kept: dict[str, Any] = {}  # the position that was restored
        self._at_end = False
        self._given = 0  # batches of the pass
        self._counted: int | None = None  # batches of a whole pass that has ended
        self._lost = False

    @property
    def keeps_its_place(self) -> bool:
        """Whether the next batch is the one after the last, here or from a checkpoint."""
        return self._iterator is not None or self._restored

    @property
    def lost_its_place(self) -> bool:
        """Whether a run was saved inside a pass over this loader, which cannot go there."""
        return self._lost

    @property
    def has_positions(self) -> bool:
        """Whether the loader says where it stands, and can go there again."""
        return hasattr(self.data, "state_dict") and hasattr(self.data, "load_state_dict")

    @property
    def pass_length(self) -> int | None:
        """Batches of a pass: what the loader says, or what a pass over it has counted."""
        return length_of(self.data) or self._counted

    def switch(self, data: Iterable[Any] | None) -> None:
        """Take the batches from `data`, from its beginning unless it is the loader in use."""
        if data is not self.data or data is None:
            self.data, self._iterator, self._restored = data, None, False
            self._given, self._counted, self._lost = 0, None, False

    def rewind(self) -> None:
        """Begin anew at the next batch."""
        # A loader that was put to the end of its pass, and not read since, must be read past it.
        self._restored = self._at_end = self._restored and _told_epoch(self.data) is None
        self._iterator, self._given, self._lost = None, 0, False

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
            batch = next(self._iterator)
        except StopIteration:
            self._counted = self._given
            self.rewind()
            raise
        except BaseException:
            self._after_failure()
            raise
        self._given += 1
        return batch

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
        if self._restored:
            self._restored = False
            return self._reopen(self.data)
        self._given = 0
        length = length_of(self.data)
        if length and epoch_length:  # two passes of one epoch must not repeat one order
            epoch = epoch * -(-epoch_length // length) + done // length
        tell_epoch(self.data, epoch)
        return iter(self.data)

    def _reopen(self, data: Any) -> Iterator[Any]:
        """Iterate a loader from its position; what it draws on the way there was drawn before."""
        data.load_state_dict(self._kept)  # again: others may have read the loader since
        drawn, generators = random_state(), _states(_generators(data))
        self._given = 0 if self._at_end else self._given
        iterator = iter(data)
        rest = list(itertools.islice(iterator, 1)) if self._at_end else []
        if rest:  # it has begun the next pass by itself
            return itertools.chain(rest, iterator)
        set_random_state(drawn)
        _set_states(_generators(data), generators)
        return iter(data) if self._at_end else iterator

    def position(self) -> dict[str, Any] | None:
        """Return the loader's own state after the last batch; None for a loader that has none."""
        if not self.has_positions:
            return None
        if self._restored:
            return dict(self._kept)
        if isinstance(self._iterator, Pass):  # another one may have begun since
            return self._iterator.position()
        return dict(self.data.state_dict())  # type: ignore[union-attr]

    def place(self) -> dict[str, Any]:
        """Return all that continues the batches elsewhere: `restore_place` takes it."""
        return {
            "loader": type(self.data).__name__,
            "position": self.position(),
            "given": self._given,
            "counted": self._counted,
            "generators": _states(_generators(self.data)),
        }

    @property
    def _inside_pass(self) -> bool:
        """Whether a pass is begun and not at its end, as an epoch of another length leaves it."""
        return self.data is not None and self._given > 0 and self._given != self.pass_length

    def restore_place(self, place: Mapping[str, Any], *, inside: bool) -> None:
        """Go to a place that `place` returned.

        Args:
            place: of the last batch.
            inside: whether it lies inside an epoch. Between two epochs, where the pass has ended
                too, a loader that is told its epoch needs no more; one of another kind begins anew.
                A loader that cannot go to a place inside a pass has then `lost_its_place`.

        Raises:
            ResumeError: if the place lies inside an epoch, and the loader cannot go there.
        """
        same = place["loader"] == type(self.data).__name__
        if inside and self.has_positions and not same:
            raise ResumeError(
                f"inside an epoch the loader must be a {place['loader']}, as when the run was "
                f"saved, got {type(self.data).__name__}"
            )
        if same:
            _set_states(_generators(self.data), place["generators"])
            self._given, self._counted = place.get("given", 0), place.get("counted")
        if inside or (self._inside_pass and self.has_positions):
            self.restore(place["position"] or {})
        elif same:
            self._restore_between_epochs(place["position"])

    def _restore_between_epochs(self, position: Mapping[str, Any] | None) -> None:
        if self._inside_pass:
            self._lost = True
        elif position is not None and _told_epoch(self.data) is None:
            self.restore(position)
            self._at_end = True

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
        self._iterator, self._restored, self._at_end = None, True, False
        self._kept = dict(position)
        self._lost = False


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
    owner = _told_epoch(data)
    if owner is not None:
        owner.set_epoch(epoch)


def _told_epoch(data: Any) -> Any:
    """Return what is told the epoch: the loader, its sampler, or None."""
    owners = (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    return next((owner for owner in owners if hasattr(owner, "set_epoch")), None)


def _generators(data: Any) -> list[torch.Generator]:
    """Return the generators of its own that a loader draws its order from."""
    held = (getattr(owner, "generator", None) for owner in (data, getattr(data, "sampler", None)))
    return [generator for generator in held if isinstance(generator, torch.Generator)]


def _states(generators: Iterable[torch.Generator]) -> list[torch.Tensor]:
    return [generator.get_state() for generator in generators]


def _set_states(generators: Iterable[torch.Generator], states: Iterable[torch.Tensor]) -> None:
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state)
