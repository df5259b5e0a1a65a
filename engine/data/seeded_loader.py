"""A loader with a position, whose order and augmentations depend on a seed alone."""

from __future__ import annotations

import atexit
import inspect
import logging
import math
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from diptych._argument_names import names_the_right_argument
from diptych._summaries import Summarized
from diptych.engine.checks import is_whole
from diptych.engine.containers import same_values
from diptych.engine.data.collation import collate_samples
from diptych.engine.data.loader_contract import Pass
from diptych.engine.data.worker_loader import WorkerLoader
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.errors import ResumeError
from diptych.engine.random_state import (
    host_state,
    mixed_seed,
    preserved_random_state,
    seed_host,
)

logger = logging.getLogger(__name__)

Draw = tuple[int, int]
"""An epoch and the index of a sample: with the seed, they determine the sample's augmentation."""


@attrs.define(eq=False)
class _PassPosition:
    """The position of a pass: its epoch, and the batches of it so far."""

    epoch: int = 0
    batch: int = 0


class SeededLoader(Summarized):
    """Loads batches of a map-style data set; resuming inside an epoch reads no skipped sample.

    The order depends on (seed, epoch) alone. Random numbers that the data set draws for a sample,
    from torch's, NumPy's or Python's global generator, depend on (seed, epoch, index) alone. Both
    are the same for any number of workers and ranks, and after an interruption. The generators of
    the calling process are not changed.

    A data set with `__getitems__` (Hugging Face's, a `Subset` of one) is read a batch at a time, if
    its samples draw nothing. The first batch is also read sample by sample and compared; a later
    batch whose reading draws is read again. From then on, samples are read one by one.

    A second pass that starts while the first is read, such as an evaluation on the training data,
    does not affect the first: the loader's position remains that of the first pass.

    Args:
        dataset: has `__len__` and `__getitem__`; `__getitems__` if it can read several at once.
        batch_size: samples of an update over all ranks; each rank gets its share of them.
        seed: the seed of order and augmentations.
        shuffle: whether each epoch has an order of its own.
        drop_last: whether to omit a smaller last batch.
        num_workers: processes that read ahead; 0: read in this process.
        collate: a function from a list of samples to a batch; None: torch's default.

    Raises:
        TypeError: if the data set has no length or no index.
        ValueError: if `batch_size` leaves a rank without a sample, or the data set is too small.
    """

    _shown = ("dataset", "batch_size", "seed", "shuffle", "drop_last")

    @names_the_right_argument
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
        if isinstance(dataset, DataLoader) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise TypeError(
                "dataset must be a map-style data set, with __len__ and __getitem__, got a "
                f"{type(dataset).__name__}. Data without an index go to the trainer in a loader of "
                "torch; a loader goes there as it is"
            )
        self.dataset, self.seed = dataset, seed
        self._shuffle, self._drop_last = shuffle, drop_last
        self.batch_size = batch_size
        self._place = self._next = _PassPosition()
        self._pass: weakref.ref[Generator[Any, None, None]] | None = None
        self._workers, self._collate = num_workers, collate
        self._batches = _Batches()
        self._loader = self._reader(self._batches, persistent=num_workers > 0)

    def _reader(self, batches: _Batches, *, persistent: bool = False) -> DataLoader[Any]:
        return WorkerLoader(
            _SeededSamples(self.dataset, self.seed),
            batch_sampler=batches,
            num_workers=self._workers,
            collate_fn=self._collate or collate_samples,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=persistent,
            generator=torch.Generator().manual_seed(self.seed),
        )

    @property
    def batch_size(self) -> int:
        """Samples of the global batch; may be set between two epochs.

        Raises:
            ValueError: on setting, if a batch would have fewer samples than there are ranks, or
                the data set does not fill one batch.
        """
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        """Set the size after checking that every rank gets a part of every batch."""
        ranks, samples = world_size(), self._samples
        if not is_whole(batch_size):
            raise ValueError(f"batch_size must be a whole number >= 1, got {batch_size!r}")
        if batch_size < ranks:
            raise ValueError(
                f"batch_size must be >= {ranks}, one sample for each rank, got {batch_size}"
            )
        if samples == 0 or (self._drop_last and samples < batch_size):
            raise ValueError(
                f"the data set must fill one batch of {batch_size}, got {samples} samples. Choose "
                "a smaller batch_size, or drop_last=False"
            )
        if 0 < samples % batch_size < ranks and not self._drop_last:
            raise ValueError(
                f"the last batch must have a sample for each of {ranks} ranks, got "
                f"{samples % batch_size}. Choose another batch_size, or set drop_last=True."
            )
        self._batch_size = batch_size

    @property
    def shuffle(self) -> bool:
        """Whether each epoch has an order of its own."""
        return self._shuffle

    @property
    def drop_last(self) -> bool:
        """Whether a smaller last batch is omitted."""
        return self._drop_last

    @property
    def _samples(self) -> int:
        return len(self.dataset)

    def __len__(self) -> int:
        whole = self._samples / self.batch_size
        return math.floor(whole) if self._drop_last else math.ceil(whole)

    def set_epoch(self, epoch: int) -> None:
        """Start epoch `epoch`, counted from 0, with the next iterator."""
        self._next = _PassPosition(epoch)
        if not self._is_read:
            self._place = self._next

    def __iter__(self) -> Iterator[Any]:
        place, self._next = self._next, _PassPosition(self._next.epoch)
        position = partial(self._position, place)
        if self._is_read:  # persistent workers serve one pass at a time
            batches = _Batches()
            return Pass(self._read(place, batches, self._reader(batches)), position)
        own = self._read(place, self._batches, self._loader)
        self._place, self._pass = place, weakref.ref(own)
        return Pass(own, position)

    @property
    def _is_read(self) -> bool:
        """Whether the pass with the loader's position is unfinished."""
        own = None if self._pass is None else self._pass()
        return own is not None and inspect.getgeneratorstate(own) != inspect.GEN_CLOSED

    def _read(
        self, place: _PassPosition, batches: _Batches, reader: DataLoader[Any]
    ) -> Generator[Any, None, None]:
        batches.shares = self.batches(place.epoch, place.batch)
        iterator = iter(reader)
        if reader.persistent_workers and iterator not in _read_by_workers:
            _read_by_workers.add(iterator)
            atexit.register(_end_workers, weakref.ref(iterator))
        for batch in iterator:
            place.batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, its batches so far, and the settings of the order."""
        return self._position(self._place)

    def _position(self, place: _PassPosition) -> dict[str, int]:
        return {
            "epoch": place.epoch,
            "batch": place.batch,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "samples": self._samples,
        }

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go to a position; the next iterator starts with the batch after it.

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
        self._place = self._next = _PassPosition(state_dict["epoch"], state_dict["batch"])
        self._pass = None

    def batches(self, epoch: int | None = None, start: int | None = None) -> Iterator[list[Draw]]:
        """Return an iterator over this rank's share of each batch of an epoch.

        Args:
            epoch: counted from 0; None: the epoch of the position.
            start: the first batch; None: the batch of the position.
        """
        epoch = self._place.epoch if epoch is None else epoch
        numbers = range(self._place.batch if start is None else start, len(self))
        return _shares(self._order(epoch), self.batch_size, epoch, numbers)

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(self._samples))
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        return torch.randperm(self._samples, generator=generator).tolist()


class _Batches:
    """The batch sampler of the DataLoader inside a `SeededLoader`.

    It does not hold the loader: in a cycle the workers would end only when Python looks for
    cycles, each after five seconds.

    Attributes:
        shares: this rank's share of each batch of the next pass.
    """

    def __init__(self) -> None:
        self.shares: Iterator[list[Draw]] = iter(())

    def __iter__(self) -> Iterator[list[Draw]]:
        return self.shares


def _shares(order: list[int], size: int, epoch: int, numbers: range) -> Iterator[list[Draw]]:
    """Yield this rank's share of some batches of an epoch."""
    for number in numbers:
        whole = order[number * size : (number + 1) * size]
        bounds = [len(whole) * r // world_size() for r in (rank(), rank() + 1)]
        yield [(epoch, index) for index in whole[bounds[0] : bounds[1]]]


_read_by_workers: weakref.WeakSet[Any] = weakref.WeakSet()


def _end_workers(reference: weakref.ref[Any]) -> None:
    """End the workers of an iterator when Python exits.

    torch before 2.13 else waits at its own exit for 5 seconds for each worker that keeps on from
    epoch to epoch and whose batches are pinned. Functions that are registered later run earlier.
    """
    iterator = reference()
    if iterator is not None:
        iterator._shutdown_workers()  # noqa: SLF001 - torch has no public name


class _SeededSamples(Dataset[Any]):
    """A data set that seeds the global generators before it reads a sample.

    A data set with `__getitems__` is read a batch at a time as long as this gives the same samples.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        self._reads_batches = callable(getattr(dataset, "__getitems__", None))
        self._compared = False

    def __getitems__(self, draws: Sequence[Draw]) -> list[Any]:
        if get_worker_info() is not None:  # nobody else draws in a worker
            return self._read(draws)
        with preserved_random_state():
            return self._read(draws)

    def __getitem__(self, draw: Draw) -> Any:
        epoch, index = draw
        seed_host(mixed_seed(self._seed, epoch, index))
        return self._dataset[index]

    def _read(self, draws: Sequence[Draw]) -> list[Any]:
        if not self._reads_batches:
            return [self[draw] for draw in draws]
        together, why = self._together(draws)
        if self._compared and not why:
            return together
        samples = [self[draw] for draw in draws]
        # Code may look at a generator's seed without a draw: compare the first batch.
        if not why and not same_values(together, samples):
            why = "its samples differ there, or cannot be compared"
        if why:
            self._read_singly(why)
        self._compared = True
        return samples

    def _together(self, draws: Sequence[Draw]) -> tuple[list[Any], str]:
        """Return the samples read at once, or why each must be read with its own seed."""
        before = host_state()
        try:
            samples = list(self._dataset.__getitems__([index for _, index in draws]))  # type: ignore[attr-defined]
        except Exception as error:  # noqa: BLE001 - what is wrong with a sample shows when it is read
            return [], f"it raises {type(error).__name__}"
        if host_state() != before:
            return [], "its samples draw random numbers, each from its own seed"
        if len(samples) != len(draws):
            return [], f"it returns {len(samples)} samples for {len(draws)} indices"
        return samples, ""

    def _read_singly(self, why: str) -> None:
        self._reads_batches = False
        worker = get_worker_info()
        if rank() == 0 and (worker is None or worker.id == 0):
            logger.info(
                "Reading the %s sample by sample, not with its __getitems__: %s.",
                type(self._dataset).__name__,
                why,
            )
