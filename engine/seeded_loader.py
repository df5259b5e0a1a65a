"""A loader whose order and augmentations are functions of a seed, its position a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from diptych.engine.distributed import rank, world_size
from diptych.engine.errors import ResumeError
from diptych.engine.random_state import mixed, preserved_random_state, seed_host

Draw = tuple[int, int]
"""An epoch and the index of a sample: together with the seed, all that its augmentation depends
on."""


class SeededLoader:
    """Gives batches of a map-style data set; resuming inside an epoch reads no skipped sample.

    The order is a function of (seed, epoch), and whatever the data set draws for a sample, from
    torch's, NumPy's or Python's global generator, is a function of (seed, epoch, index): the
    number of workers, of ranks, and an interruption change neither. The generators of the calling
    process stay as they are.

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
        self._epoch = self._batch = self._start = 0
        self._loader = DataLoader(
            _SeededSamples(dataset, seed),
            batch_sampler=_Batches(self),
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(seed),
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
        self._epoch, self._batch, self._start = epoch, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self._batch, self._start = self._start, 0
        for batch in self._loader:
            self._batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, its batches so far, and what the order depends on."""
        return {
            "epoch": self._epoch,
            "batch": self._batch,
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
        self._epoch = state_dict["epoch"]
        self._batch = self._start = state_dict["batch"]

    def batches(self) -> Iterator[list[Draw]]:
        """Give this rank's share of each batch of the epoch, from the position on."""
        order = self._order()
        for number in range(self._batch, len(self)):
            whole = order[number * self.batch_size : (number + 1) * self.batch_size]
            bounds = [len(whole) * r // world_size() for r in (rank(), rank() + 1)]
            yield [(self._epoch, index) for index in whole[bounds[0] : bounds[1]]]

    def _order(self) -> list[int]:
        if not self._shuffle:
            return list(range(self._samples))
        generator = torch.Generator().manual_seed(mixed(self.seed, self._epoch))
        return torch.randperm(self._samples, generator=generator).tolist()


class _Batches:
    """The batch sampler of a `SeededLoader`'s own DataLoader."""

    def __init__(self, loader: SeededLoader) -> None:
        self._owner = loader

    def __iter__(self) -> Iterator[list[Draw]]:
        return self._owner.batches()

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
