"""Drawings with category labels, and pairs of drawings: data for training without captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.emoji.augment import NUMBER_OF_DRAWS, augment
from examples.emoji.data import (
    EVALUATION_BATCH_SIZE,
    STYLES,
    Batch,
    Drawing,
    Emoji,
    training_drawings,
)
from examples.emoji.splits import UNSEEN_EMOJI


def category_names(emoji: Sequence[Emoji]) -> list[str]:
    """Return the names of the categories; the index of a name is its label."""
    return sorted({one.category for one in emoji})


def unseen_emoji_drawings(emoji: Sequence[Emoji]) -> list[Drawing]:
    """Return both drawings of the emoji that are not in training."""
    return [(i, s) for i, one in enumerate(emoji) if one.split == UNSEEN_EMOJI for s in STYLES]


def labelled_batches(emoji: Sequence[Emoji], drawings: Sequence[Drawing]) -> list[Batch]:
    """Return batches of `image` [B, 3, 32, 32] in [0, 1] and `label` [B], without augmentation."""
    names = category_names(emoji)
    images = torch.stack([emoji[i].drawings[style] for i, style in drawings]).float() / 255
    labels = torch.tensor([names.index(emoji[i].category) for i, _ in drawings])
    pieces = zip(*(part.split(EVALUATION_BATCH_SIZE) for part in (images, labels)), strict=True)
    return [{"image": image, "label": label} for image, label in pieces]


def largest_share(batches: Sequence[Batch]) -> float:
    """Return the accuracy of always predicting the most frequent label."""
    counts = Counter(torch.cat([batch["label"] for batch in batches]).tolist())
    return max(counts.values()) / sum(counts.values())


class LabelledDrawings(Dataset[dict[str, Any]]):
    """A data set of the training drawings, each with the label of its category."""

    def __init__(self, emoji: Sequence[Emoji]) -> None:
        names = category_names(emoji)
        self._samples = [
            (emoji[i].drawings[style], names.index(emoji[i].category))
            for i, style in training_drawings(emoji)
        ]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self._samples[index]
        return {"image": image, "draws": torch.rand(NUMBER_OF_DRAWS), "label": label}


class ManyViews(Dataset[dict[str, Any]]):
    """A data set of views of an emoji, each of one of its training drawings.

    Args:
        views: the number of views.
    """

    def __init__(self, emoji: Sequence[Emoji], views: int = 2) -> None:
        self._views = views
        drawings: dict[int, list[Tensor]] = {}
        for i, style in training_drawings(emoji):
            drawings.setdefault(i, []).append(emoji[i].drawings[style])
        self._samples = list(drawings.items())

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, drawings = self._samples[index]
        chosen = torch.randint(len(drawings), (self._views,)).tolist()
        return {
            "image": torch.stack([drawings[i] for i in chosen]),
            "draws": torch.rand(self._views, NUMBER_OF_DRAWS),
            "group": group,
        }


def collate_labelled(samples: Sequence[dict[str, Any]]) -> Batch:
    """Return `image` [B, 3, 32, 32], augmented, and `label` [B]."""
    images = torch.stack([sample["image"] for sample in samples])
    draws = torch.stack([sample["draws"] for sample in samples])
    labels = torch.tensor([sample["label"] for sample in samples])
    return {"image": augment(images, draws), "label": labels}


def collate_views(samples: Sequence[dict[str, Any]]) -> Batch:
    """Return `first` and `second` [B, 3, 32, 32], augmented independently, and `group` [B]."""
    groups = torch.tensor([sample["group"] for sample in samples])
    first, second = (augment(*view) for view in zip(*_views(samples), strict=True))
    return {"first": first, "second": second, "group": groups}


def collate_crops(samples: Sequence[dict[str, Any]], *, zoom: float) -> Batch:
    """Return two views, `large` [B, 2, 3, 32, 32], and the others, `small` [B, V - 2, 3, 32, 32].

    Args:
        samples: those of `ManyViews`.
        zoom: of the small crops, which have the size of the large ones and show less of a drawing.
    """
    views = list(zip(*_views(samples), strict=True))
    large = [augment(images, draws) for images, draws in views[:2]]
    small = [augment(images, draws, zoom=zoom) for images, draws in views[2:]]
    return {"large": torch.stack(large, dim=1), "small": torch.stack(small, dim=1)}


def _views(samples: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return images [V, B, 3, 32, 32] and random draws [V, B, NUMBER_OF_DRAWS]."""
    images = torch.stack([sample["image"] for sample in samples], dim=1)
    return images, torch.stack([sample["draws"] for sample in samples], dim=1)
