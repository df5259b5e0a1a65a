"""The batches of a run: a loader, its iterator, and the position in it."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from diptych.engine.data.loader_contract import (
    ListLoader,
    PositionedLoader,
    generator_states,
    has_position,
    length_of,
    position_getter,
    repeats_its_order,
    set_epoch,
    set_generator_states,
    takes_epoch,
    with_position,
)
from diptych.engine.data.seeded_loader import SeededLoader
from diptych.engine.errors import ResumeError
from diptych.engine.random_state import (
    GeneratorSnapshot,
    preserved_random_state,
    random_state,
    set_random_state,
)

logger = logging.getLogger(__name__)


class Draws:
    """The states of the host's random generators, and of those of a loader, at some moment.

    Attributes:
        epoch: of the pass that starts then.
    """

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self._generators = GeneratorSnapshot(torch.device("cpu"))
        self._own: list[torch.Tensor] = []

    def take(self, loader: object) -> None:
        """Copy the states."""
        self._generators.take()
        self._own = generator_states(loader)

    def restore(self, loader: object) -> None:
        """Restore the states."""
        self._generators.restore()
        set_generator_states(loader, self._own)


class BatchSource:
    """Returns the batches of a loader, epoch after epoch, and keeps its place between two runs.

    Attributes:
        data: the loader; None gives `None` as every batch.
        lost_its_place: whether a run was saved inside a pass over this loader, which has no
            position to go back to.
    """

    def __init__(self) -> None:
        self.data: Iterable[Any] | None = None
        self._loader: Any = None  # the same, with a position if it is a list
        self.lost_its_place = False
        self._iterator: Iterator[Any] | None = None
        self._restored: dict[str, Any] | None = None  # the loader's position, until it is read
        self._at_end = False  # whether that position is the end of a pass
        self._given = 0  # batches of this pass so far
        self._counted: int | None = None  # batches of a whole pass that has ended
        self._epoch_set: int | None = None  # the epoch that the loader was told for its next pass
        self._ahead: list[Any] = []  # the batch that `has_more` has read
        self._place_before: dict[str, Any] = {}  # without that batch
        self._before = Draws()  # before the batch that is being read
        self._start: Draws | None = None  # at the start of the pass, if it can be read again
        self._begins = (
            False  # whether the restored position is the start of a pass, after a failure
        )
        self._to_skip: int | None = None  # batches that the next iterator is to leave out

    @property
    def keeps_its_place(self) -> bool:
        """Whether the loader is positioned after the last batch, also of a resumed run."""
        positioned = self._iterator is not None or self._restored is not None
        return positioned or self._to_skip is not None

    @property
    def has_positions(self) -> bool:
        """Whether the loader can save its position and continue from one."""
        return has_position(self._loader)

    @property
    def pass_length(self) -> int | None:
        """Batches of a pass: the loader's length, or the count of a pass that has ended."""
        return length_of(self.data) or self._counted

    def switch(self, data: Iterable[Any] | None) -> None:
        """Take the batches from `data`, from its beginning unless it is the loader in use."""
        if data is not self.data or data is None:
            self.data, self._iterator, self._restored = data, None, None
            self._loader = with_position(data)
            self._given, self._counted, self.lost_its_place = 0, None, False
            self._ahead, self._epoch_set = [], None
            self._start = self._to_skip = None

    def start_epoch(self, epoch: int) -> int | None:
        """Return the number of batches of the pass that starts with an epoch, if it is known.

        The epoch is counted from 0; the length of some loaders depends on it.
        """
        if self._iterator is None and self._restored is None:
            set_epoch(self.data, epoch)
            self._epoch_set = epoch
        return length_of(self.data)

    def go_to(self, epoch: int, done: int) -> bool:
        """Go behind the first batches of a pass; return False if its order is not known.

        That of a list and of a `SeededLoader` is.

        Args:
            epoch: counted from 0.
            done: batches.
        """
        if isinstance(self._loader, ListLoader):
            self.restore({"done": done})
        elif isinstance(self._loader, SeededLoader):
            self.restore({**self._loader.state_dict(), "epoch": epoch, "batch": done})
        else:
            return False
        self._given = done
        return True

    def rewind(self) -> None:
        """Start a new pass with the next batch."""
        # A loader that was restored and not read since is still inside its pass, unless set_epoch
        # rewinds it: exhaust that pass first.
        if takes_epoch(self.data):
            self._restored = None
        self._at_end = self._restored is not None
        self._iterator, self._given, self.lost_its_place = None, 0, False
        self._ahead, self._to_skip = [], None

    def has_more(self, epoch: int) -> bool:
        """Return whether the pass continues; reads a batch ahead, which `next` then returns.

        The position stays that of the batch before.
        """
        with preserved_random_state():  # the state_dict() of some loaders draws random numbers
            place = copy.deepcopy(self.place())  # a loader may return its own, living state
        try:
            self._ahead = [self.next(epoch)]
        except StopIteration:
            return False
        self._place_before = place
        return True

    def next(self, epoch: int, done: int = 0, epoch_length: int | None = None) -> Any:
        """Return the next batch.

        Args:
            epoch: counted from 0, for a loader that orders its samples by it.
            done: batches of the epoch that are done.
            epoch_length: batches of the epoch; if the loader has fewer, an epoch is several passes.

        Raises:
            StopIteration: if the pass over the loader has ended; the next call starts another.
        """
        if self._ahead:
            return self._ahead.pop()
        draws = self.data is not None and not isinstance(self._loader, ListLoader)
        if draws:
            self._before.take(self.data)
        opens, restored = self._iterator is None, self._restored
        try:
            if self._iterator is None:
                self._iterator = self._open(epoch, done, epoch_length)
            batch = next(self._iterator)
        except StopIteration:
            self._counted = self._given
            self.rewind()
            raise
        except BaseException:
            if draws:
                self._before.restore(self.data)
            self._after_failure(restored, opens=opens)
            raise
        self._given += 1
        return batch

    def _after_failure(self, restored: dict[str, Any] | None, *, opens: bool) -> None:
        """Keep the place, so that the next call reads the batch that could not be read.

        Args:
            restored: the position to which the loader had been restored, if it was not read since.
            opens: whether the call has opened an iterator.
        """
        if has_position(self._loader):
            self._restore_after_failure(restored, opens=opens)
        elif self._start is not None:
            self._iterator, self._to_skip = None, self._given
        elif opens or inspect.isgenerator(self._iterator) or isinstance(self.data, DataLoader):
            self.rewind()  # else a batch would be missing

    def _restore_after_failure(self, restored: dict[str, Any] | None, *, opens: bool) -> None:
        if self._iterator is None and restored is not None:  # it could not be opened
            at_end = self._at_end
            self.restore(restored)
            self._at_end = at_end
        else:
            self.restore(self.position() or {})
            self._begins = opens and restored is None

    def _open(self, epoch: int, done: int, epoch_length: int | None) -> Iterator[Any]:
        if self.data is None:
            return itertools.repeat(None)
        if self._restored is not None and has_position(self._loader):
            position, self._restored = self._restored, None
            return self._reopen(self._loader, position)
        if self._to_skip and self._start is not None:
            return self._read_again(self._to_skip, self._start)
        return self._open_pass(epoch, done, epoch_length)

    def _open_pass(self, epoch: int, done: int, epoch_length: int | None) -> Iterator[Any]:
        self._given = 0
        length = length_of(self.data)
        if length and epoch_length:  # two passes of one epoch must not repeat one order
            epoch = epoch * -(-epoch_length // length) + done // length
        self._start = Draws(epoch) if repeats_its_order(self.data) else None
        if self._start is not None:
            self._start.take(self.data)
        if epoch != self._epoch_set:
            set_epoch(self.data, epoch)
        self._epoch_set = self._to_skip = None
        iterator: Iterator[Any] = iter(self._loader)
        return iterator

    def _read_again(self, count: int, start: Draws) -> Iterator[Any]:
        """Iterate a loader without positions behind the first batches of the same pass."""
        logger.info("Reading %d batches again: the loader has no state_dict().", count)
        now = Draws()
        now.take(self.data)
        start.restore(self.data)
        set_epoch(self.data, start.epoch)
        iterator: Iterator[Any] = iter(self._loader)
        for _ in itertools.islice(iterator, count):
            continue
        now.restore(self.data)
        self._to_skip = None
        return iterator

    def _reopen(self, data: PositionedLoader, position: dict[str, Any]) -> Iterator[Any]:
        """Iterate a loader from a position, without the random draws that were made before it."""
        begins, self._begins = self._begins, False
        data.load_state_dict(position)  # again: others may have read the loader since
        drawn, generators = random_state(), generator_states(data)
        iterator = iter(data)
        if self._at_end:
            self._given = 0
            for batch in iterator:  # the loader has started the next pass by itself
                return itertools.chain([batch], iterator)
        if not begins:
            set_random_state(drawn)
            set_generator_states(data, generators)
        return iter(data) if self._at_end else iterator

    def position(self) -> dict[str, Any] | None:
        """Return the loader's own state after the last batch; None if the loader has none."""
        if not has_position(self._loader):
            return None
        if self._ahead:
            return dict(self._place_before["position"])
        if self._restored is not None:
            return dict(self._restored)
        return dict(position_getter(self._iterator, self._loader)())

    def place(self) -> dict[str, Any]:
        """Return the state with which `restore_place` continues the batches in another process."""
        if self._ahead:
            return self._place_before
        return {
            "loader": type(self.data).__name__,
            "position": self.position(),
            "given": self._given,
            "counted": self._counted,
            "generators": generator_states(self.data),
        }

    @property
    def _inside_pass(self) -> bool:
        """Whether a pass has begun and not ended, as after an epoch of another length."""
        return self.data is not None and self._given > 0 and self._given != self.pass_length

    def try_place(
        self, data: Iterable[Any] | None, place: Mapping[str, Any], *, inside: bool
    ) -> None:
        """Check that a loader can go to a place that `place` returned, and leave it where it is.

        Raises:
            ResumeError: as `restore_place`.
        """
        check_place(data, place, inside=inside)
        if not inside or not has_position(data):
            return
        before = data.state_dict()
        try:
            data.load_state_dict(dict(place["position"] or {}))
        finally:
            data.load_state_dict(before)

    def restore_place(self, place: Mapping[str, Any], *, inside: bool) -> None:
        """Go to a place that `place` returned.

        Between two epochs, if the pass has ended too, a loader with `set_epoch` needs no position,
        and a loader of another class starts from its beginning. If the place is inside a pass and
        the loader has no position, it has `lost_its_place`.

        Raises:
            ResumeError: if the place is inside an epoch and the loader cannot go there.
        """
        check_place(self.data, place, inside=inside)
        same = place["loader"] == type(self.data).__name__
        if same:
            set_generator_states(self.data, place["generators"])
            self._given, self._counted = place.get("given", 0), place.get("counted")
        if inside or (self._inside_pass and self.has_positions):
            self.restore(place["position"] or {})
        elif same:
            self._restore_between_epochs(place["position"])

    def _restore_between_epochs(self, position: Mapping[str, Any] | None) -> None:
        if self._inside_pass:
            self.lost_its_place = True
        elif position is not None and not takes_epoch(self.data):
            self.restore(position)
            self._at_end = True

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go to a position that `position` returned.

        Raises:
            ResumeError: if the loader cannot go to a position.
        """
        if not has_position(self._loader):
            raise ResumeError(
                "a run that stopped inside an epoch needs a loader with load_state_dict(), "
                f"got {type(self.data).__name__}"
            )
        self._loader.load_state_dict(position)
        self._begins = False
        self._iterator, self._restored, self._ahead = None, dict(position), []
        self._epoch_set = None
        self._at_end = self.lost_its_place = False


def check_place(data: object, place: Mapping[str, Any], *, inside: bool) -> None:
    """Check that a loader has positions, and is of the class whose position a place is.

    Raises:
        ResumeError: if the place is inside an epoch, and the loader does not fit.
    """
    here = type(data).__name__
    if not inside:
        return
    if not has_position(with_position(data)):
        raise ResumeError(
            f"a run that stopped inside an epoch needs a loader with load_state_dict(), got {here}"
        )
    if place["loader"] != here:
        raise ResumeError(
            f"inside an epoch the loader must be a {place['loader']}, as when the run was saved, "
            f"got {here}"
        )
