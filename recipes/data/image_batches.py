"""Data sets and batches of images with captions or classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diptych.engine.data.seeded_loader import SeededLoader
from diptych.engine.distributed.collectives import world_size
from diptych.engine.tasks import NO_LABEL
from diptych.recipes.data.augmentations import augmentations
from diptych.recipes.data.image_files import ImageError, read_image, to_tensor
from diptych.recipes.data.image_table import ImageRow
from diptych.recipes.data.rows import DataError
from diptych.recipes.towers.parts import Tokens
from diptych.recipes.towers.resize import Resize

if TYPE_CHECKING:
    from PIL import Image

    from diptych.recipes.data.augmentations import Augmentation

Batch = dict[str, Any]
EVALUATION_BATCH = 256


class ImageRows(Dataset[dict[str, Any]]):
    """Samples of rows; the images are read, augmented and cropped when they are needed.

    Args:
        rows: the rows.
        resize: makes the images square.
        augment: names of augmentations.
        classes: the names of the classes, in the order of their numbers.
        views: views of each image.
    """

    def __init__(
        self,
        rows: Sequence[ImageRow],
        resize: Resize,
        *,
        augment: Sequence[str] = (),
        classes: Sequence[str] = (),
        views: int = 1,
    ) -> None:
        self._rows, self._views = rows, views
        self._augment = augmentations(augment)
        self._resize = resize
        groups = dict.fromkeys(row.group for row in rows)
        self._groups = {group: number for number, group in enumerate(groups)}
        images = dict.fromkeys(row.name for row in rows)
        self._images = {name: number for number, name in enumerate(images)}
        self._labels = {name: number for number, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        try:
            image = read_image(row.path, self._resize.resized)
        except ImageError as error:
            raise DataError(f"{row.path} can no longer be used: {error}") from error
        return {
            "views": [view(image, self._augment, self._resize) for _ in range(self._views)],
            "caption": row.caption,
            "group": self._groups[row.group],
            "image_id": self._images[row.name],
            "caption_id": index,
            "label": self._labels.get(row.label, NO_LABEL),
        }


def view(image: Image.Image, augment: Sequence[Augmentation], resize: Resize) -> Tensor:
    """Return an image as uint8 [3, size, size]; all that augmentations have left of it is kept."""
    for change in augment:
        image = change(image)
    resize = attrs.evolve(resize, kept=1.0) if augment else resize
    return to_tensor(resize(image))


@attrs.frozen
class PairBatch:
    """Joins samples into a batch of `image`, `text`, `group`, `image_id` and `caption_id`.

    With the ids, a metric of retrieval counts an image once that has several captions.

    Attributes:
        tokenize: maps captions to tokens.
    """

    tokenize: Callable[[Sequence[str]], Tokens]

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """Return the batch."""
        return {
            "image": _stacked(samples, 0),
            "text": self.tokenize([sample["caption"] for sample in samples]),
            **{
                name: torch.tensor([sample[name] for sample in samples])
                for name in ("group", "image_id", "caption_id")
            },
        }


def views_batch(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Return a batch of two views, `first` and `second`."""
    return {"first": _stacked(samples, 0), "second": _stacked(samples, 1)}


def labelled_batch(samples: Sequence[Mapping[str, Any]]) -> Batch:
    """Return a batch of `image` and `label`."""
    labels = torch.tensor([sample["label"] for sample in samples])
    return {"image": _stacked(samples, 0), "label": labels}


def evaluation_loader(
    dataset: ImageRows, collate: Callable[[list[Any]], Batch], *, workers: int = 0
) -> SeededLoader:
    """Return a loader in the order of the rows; each rank reads its share of every batch.

    Raises:
        DataError: if there are fewer rows than ranks.
    """
    ranks, rows = world_size(), len(dataset)
    sizes = (s for s in range(EVALUATION_BATCH, 0, -1) if not 0 < rows % s < ranks and s >= ranks)
    size = next(sizes, None)
    if size is None or rows < ranks:
        raise DataError(f"a part of the data must have a row for each of {ranks} ranks, got {rows}")
    return SeededLoader(dataset, size, shuffle=False, num_workers=workers, collate=collate)


def _stacked(samples: Sequence[Mapping[str, Any]], view: int) -> Tensor:
    return torch.stack([sample["views"][view] for sample in samples])
