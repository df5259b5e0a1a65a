"""The training and evaluation batches of settings: of a folder of images, or of shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import attrs

from diptych.engine.data.batches import of_this_rank
from diptych.engine.data.seeded_loader import SeededLoader
from diptych.engine.distributed.collectives import world_size
from diptych.recipes.data.image_batches import (
    EVALUATION_BATCH,
    ImageRows,
    PairBatch,
    evaluation_loader,
    labelled_batch,
    views_batch,
)
from diptych.recipes.data.image_table import ImageTable, read_table
from diptych.recipes.data.rows import DataError
from diptych.recipes.data.shards import (
    ShardLoader,
    ShardReader,
    count_samples,
    held_out_samples,
    shard_paths,
)
from diptych.recipes.settings import Settings
from diptych.recipes.towers.parts import Towers

HELD_OUT = 1000
"""The samples of the last shard that are evaluated, at most; they are kept in memory."""


class TrainingData(Protocol):
    """Data that a training reads."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, for a classification."""
        ...

    @property
    def summary(self) -> str:
        """A short table of what was found."""
        ...

    def training_loader(self, towers: Towers) -> Any:
        """Return the training batches."""
        ...

    def evaluation_loader(self, towers: Towers) -> Any:
        """Return the batches of the held-out part; None if there is none."""
        ...


def read_data(settings: Settings) -> TrainingData:
    """Find and check the data of settings; nothing is written.

    Raises:
        DataError: if they cannot be used.
    """
    if settings.shards is None:
        return TableData(settings)
    if settings.images is not None or settings.captions is not None:
        raise DataError(
            "--shards must not come with --images or --captions, which would not be read. Leave "
            "out one or the other."
        )
    return ShardData(settings)


@attrs.define(eq=False, slots=False)
class TableData:
    """A folder of images with captions or classes.

    Args:
        settings: of the training.
    """

    settings: Settings
    table: ImageTable = attrs.field(init=False)

    @table.default
    def _read(self) -> ImageTable:
        return read_table(self.settings)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, for a classification."""
        is_classification = self.settings.task == "classification"
        return tuple(self.table.classes) if is_classification else ()

    @property
    def summary(self) -> str:
        """A short table of what was found."""
        return self.table.summary(self.settings.held_out)

    def training_loader(self, towers: Towers) -> SeededLoader:
        """Return the training batches; the batch is smaller if the rows do not fill one."""
        settings = self.settings
        rows = self.table.parts(settings.held_out)["train"]
        dataset = ImageRows(
            rows,
            towers.image.resize,
            augment=settings.augmentations,
            classes=self.classes,
            views=2 if settings.task == "two_views" else 1,
        )
        return SeededLoader(
            dataset,
            min(settings.batch_size, max(1, len(rows))),
            seed=settings.seed,
            drop_last=True,
            num_workers=settings.workers,
            collate=self._collate(towers),
        )

    def evaluation_loader(self, towers: Towers) -> SeededLoader | None:
        """Return the batches of the held-out part; None if there is none."""
        rows = self.table.parts(self.settings.held_out)["val"]
        if not rows or self.settings.task == "two_views":
            return None
        dataset = ImageRows(rows, towers.image.resize, classes=self.classes)
        return evaluation_loader(dataset, self._collate(towers), workers=self.settings.workers)

    def _collate(self, towers: Towers) -> Any:
        if self.settings.task == "image_text" and towers.text is not None:
            return PairBatch(towers.text.tokenize)
        return views_batch if self.settings.task == "two_views" else labelled_batch


@attrs.define(eq=False)
class ShardData:
    """Tar files of images and captions; of several, the last one is held out.

    Args:
        settings: of the training.
    """

    settings: Settings
    paths: Sequence[Path] = attrs.field(init=False)
    samples: int = attrs.field(init=False)
    classes: tuple[str, ...] = attrs.field(default=(), init=False)

    @paths.default
    def _find(self) -> list[Path]:
        if self.settings.task != "image_text":
            raise DataError(f"--task must be image_text for shards, got {self.settings.task}")
        return shard_paths(self.settings.shards or "")

    @samples.default
    def _count(self) -> int:
        return self.settings.shard_samples or count_samples(self.paths[0]) * len(self._trained)

    @property
    def _trained(self) -> Sequence[Path]:
        return self.paths[:-1] if len(self.paths) > 1 and self.settings.held_out else self.paths

    @property
    def summary(self) -> str:
        """A short table of what was found."""
        about = "" if self.settings.shard_samples else ", as many a shard as in the first"
        return (
            f"{self.settings.shards} (shards)\n"
            f"  shards to train on {len(self._trained):>12,}\n"
            f"  samples an epoch   {self.samples:>12,}{about}\n"
            f"  shards held out    {len(self.paths) - len(self._trained):>12,}"
        )

    def training_loader(self, towers: Towers) -> ShardLoader:
        """Return the training batches."""
        settings = self.settings
        size = min(settings.batch_size, self.samples // world_size() * world_size())
        return ShardLoader(
            self._trained,
            size,
            self.samples // size,
            reader=self._reader(towers),
            collate=self._collate(towers),
            workers=settings.workers,
        )

    def evaluation_loader(self, towers: Towers) -> list[Any] | None:
        """Return the batches of the held-out shard; None if there is none."""
        if len(self._trained) == len(self.paths):
            return None
        found = held_out_samples(self.paths[-1], HELD_OUT, self._reader(towers))
        starts = range(0, len(found), EVALUATION_BATCH)
        whole = [self._collate(towers)(found[i : i + EVALUATION_BATCH]) for i in starts]
        return of_this_rank([batch for batch in whole if len(batch["group"]) >= world_size()])

    def _reader(self, towers: Towers) -> ShardReader:
        settings = self.settings
        return ShardReader(
            resize=towers.image.resize, augment=settings.augmentations, seed=settings.seed
        )

    def _collate(self, towers: Towers) -> PairBatch:
        assert towers.text is not None
        return PairBatch(towers.text.tokenize)
