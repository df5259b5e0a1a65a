"""A loader whose order and augmentations are functions of a seed, its position a number."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from diptych.engine.checks import is_whole
from diptych.engine.data.batch_source import Pass
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.errors import ResumeError
from diptych.engine.random_state import mixed, preserved_random_state, seed_host

Draw = tuple[int, int]
"""An epoch and the index of a sample: together with the seed, all that its augmentation depends
on."""


@attrs.define(eq=False)
class _Place:
    """Where a pass stands."""

    epoch: int = 0
    batch: int = 0


class SeededLoader:
    """Gives batches of a map-style data set; resuming inside an epoch reads no skipped sample.

    The order is a function of (seed, epoch), and whatever the data set draws for a sample, from
    torch's, NumPy's or Python's global generator, is a function of (seed, epoch, index): the
    number of workers, of ranks, and an interruption change neither. The generators of the calling
    process stay as they are.

    A pass that begins while another one is read, such as an evaluation on the training data,
    changes nothing for that one: the loader's position stays that of the first.

    Args:
        dataset: has `__len__` and `__getitem__`.
        batch_size: samples of an update, over all ranks together; each rank gets its share of it.
        seed: of order and augmentations.
        shuffle: whether each epoch has an order of its own.
        drop_last: whether a last, smaller batch is left out.
        num_workers: processes that read ahead; 0 reads in this one.
        collate: makes a batch of a list of samples; torch's default otherwise.

    Raises:
        ValueError: if the data set has fewer samples than ranks, or a batch fewer than one for
            each.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        num_workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self._shuffle, self._drop_last = shuffle, drop_last
        self.batch_size = batch_size
        self._place = self._next = _Place()
        self._pass: weakref.ref[Generator[Any, None, None]] | None = None
        self._workers, self._collate = num_workers, collate
        self._batches = _Batches(self)
        self._loader = self._reader(self._batches, persistent=num_workers > 0)

    def _reader(self, batches: _Batches, *, persistent: bool = False) -> DataLoader[Any]:
        return DataLoader(
            _SeededSamples(self.dataset, self.seed),
            batch_sampler=batches,
            num_workers=self._workers,
            collate_fn=self._collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=persistent,
            generator=torch.Generator().manual_seed(self.seed),
        )

    @property
    def batch_size(self) -> int:
        """Samples of the global batch; may be set between two epochs.

        Raises:
            ValueError: when it is set, if a batch would have fewer samples than there are ranks,
                or the data set does not fill one.
        """
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        """Take another size, if every rank has a part of every batch of that size."""
        ranks, samples = world_size(), self._samples
        if not is_whole(batch_size):
            raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
        if batch_size < ranks:
            raise ValueError(
                f"batch_size must be >= {ranks}, one sample for each rank, got {batch_size}"
            )
        if samples == 0 or (self._drop_last and samples < batch_size):
            raise ValueError(
                f"the data set must fill one batch of {batch_size}, got {samples} samples"
            )
        if 0 < samples % batch_size < ranks and not self._drop_last:
            raise ValueError(
                f"the last batch must have a sample for each of {ranks} ranks, got "
                f"{samples % batch_size}: take another batch_size, or drop_last=True"
            )
        self._batch_size = batch_size

    @property
    def _samples(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        whole = self._samples / self.batch_size
        return math.floor(whole) if self._drop_last else math.ceil(whole)

    def set_epoch(self, epoch: int) -> None:
        """Begin epoch `epoch`, counted from 0, at the next iteration."""
        self._next = _Place(epoch)
        if not self._is_read:
            self._place = self._next

    def __iter__(self) -> Iterator[Any]:
        place, self._next = self._next, _Place(self._next.epoch)
        position = partial(self._position, place)
        if self._is_read:  # persistent workers serve one pass at a time
            batches = _Batches(self)
            return Pass(self._read(place, batches, self._reader(batches)), position)
        own = self._read(place, self._batches, self._loader)
        self._place, self._pass = place, weakref.ref(own)
        return Pass(own, position)

    @property
    def _is_read(self) -> bool:
        """Whether the pass whose position is the loader's goes on."""
        own = None if self._pass is None else self._pass()
        return own is not None and inspect.getgeneratorstate(own) != inspect.GEN_CLOSED

    def _read(
        self, place: _Place, batches: _Batches, reader: DataLoader[Any]
    ) -> Generator[Any, None, None]:
        batches.place = place
        for batch in reader:
            place.batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, its batches so far, and what the order depends on."""
        return self._position(self._place)

    def _position(self, place: _Place) -> dict[str, int]:
        return {
            "epoch": place.epoch,
            "batch": place.batch,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "samples": self._samples,
        }

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go to a position; the next iteration begins with the batch after it.

        Raises:
            ResumeError: if the seed, the batch size or the number of samples differs.
        """
        mine = self.state_dict()
        for key in ("seed", "batch_size", "samples"):
            if state_dict[key] != mine[key]:
                raise ResumeError(
                    f"the data's {key} must be {state_dict[key]}, as when the run was saved, "
                    f"got {mine[key]}"
                )
        self._place = self._next = _Place(state_dict["epoch"], state_dict["batch"])
        self._pass = None

    def batches(self, epoch: int | None = None, start: int | None = None) -> Iterator[list[Draw]]:
        """Give this rank's share of each batch of an epoch.

        Args:
            epoch: counted from 0; None: that of the position.
            start: the first batch; None: that of the position.
        """
        epoch = self._place.epoch if epoch is None else epoch
        order = self._order(epoch)
        for number in range(self._place.batch if start is None else start, len(self)):
            whole = order[number * self.batch_size : (number + 1) * self.batch_size]
            bounds = [len(whole) * r // world_size() for r in (rank(), rank() + 1)]
            yield [(epoch, index) for index in whole[bounds[0] : bounds[1]]]

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(self._samples))
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        return torch.randperm(self._samples, generator=generator).tolist()


class _Batches:
    """The batch sampler of a `SeededLoader`'s own DataLoader."""

    def __init__(self, loader: SeededLoader) -> None:
        self._owner, self.place = loader, _Place()

    def __iter__(self) -> Iterator[list[Draw]]:
        return self._owner.batches(self.place.epoch, self.place.batch)

    def __len__(self) -> int:
        return len(self._owner)


class _SeededSamples(Dataset[Any]):
    """Reads each sample with generators seeded for it alone."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitems__(self, draws: Sequence[Draw]) -> list[Any]:
        if get_worker_info() is not None:  # a worker's generators are its own
            return [self[draw] for draw in draws]
        with preserved_random_state():
            return [self[draw] for draw in draws]

    def __getitem__(self, draw: Draw) -> Any:
        epoch, index = draw
        seed_host(mixed(self._seed, epoch, index))
        return self._dataset[index]
