"""The emoji data set: the archive, augmented training samples, and evaluation batches."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from diptych.recipes.towers.small_towers import tokenize
from examples.emoji.augment import NUMBER_OF_DRAWS, augment
from examples.emoji.splits import SEEN, UNSEEN_DRAWING, UNSEEN_EMOJI

ARCHIVE = Path(__file__).parent / "data" / "emoji.tar.gz"
IMAGE_SIZE = 32
STYLES = ("noto", "twemoji")
KEYWORD_PROBABILITY = 0.7
TOKEN_DROPOUT = 0.2
EVALUATION_BATCH_SIZE = 512

Drawing = tuple[int, str]
"""The index of an emoji, and the style of one of its drawings."""

Batch = dict[str, Tensor]


@attrs.frozen(kw_only=True, eq=False)
class Emoji:
    """One emoji of the archive.

    Attributes:
        name: the English name, such as "red heart".
        keywords: other words for it.
        category: one of nine, such as "animals-nature".
        subcategory: one of ninety-eight, such as "animal-bird".
        hexcode: code points in hexadecimal, joined by hyphens.
        family: hexcode of the first of its near twins; see `splits`.
        split: "seen", "unseen_drawing" or "unseen_emoji".
        drawings: style to uint8 [3, 32, 32].
    """

    name: str
    keywords: Sequence[str]
    category: str
    subcategory: str
    hexcode: str
    family: str
    split: str
    drawings: dict[str, Tensor]


def read_emoji(path: Path = ARCHIVE) -> list[Emoji]:
    """Read the archive in its order; an emoji's index in the list is its group id."""
    members: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, extension = member.name.split(".", maxsplit=1)
            file = archive.extractfile(member)
            assert file is not None  # the archive contains only files
            members.setdefault(key, {})[extension] = file.read()
    return [
        Emoji(
            **json.loads(sample["json"]),
            drawings={style: _decode(sample[f"{style}.png"]) for style in STYLES},
        )
        for sample in members.values()
    ]


def to_tensor(image: Image.Image) -> Tensor:
    """Return an image as an RGB tensor, uint8 [3, H, W]."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def _decode(png: bytes) -> Tensor:
    return to_tensor(Image.open(io.BytesIO(png)))


def training_drawings(emoji: Sequence[Emoji]) -> list[Drawing]:
    """Return the training drawings: both of `seen` emoji, one of `unseen_drawing` emoji."""
    styles = {SEEN: STYLES, UNSEEN_DRAWING: STYLES[:1], UNSEEN_EMOJI: ()}
    return [(i, style) for i, one in enumerate(emoji) for style in styles[one.split]]


class TrainingPairs(Dataset[dict[str, Any]]):
    """A data set of drawings and captions; random numbers come from torch's global generator.

    A caption is the name and each keyword with probability 0.7; a fifth of the tokens is dropped.
    The random numbers of the augmentation are drawn here, per sample, and applied by `collate` to
    the whole batch at once. The result therefore does not depend on the other samples of the batch.
    """

    def __init__(self, emoji: Sequence[Emoji]) -> None:
        self._drawings = training_drawings(emoji)
        self._images = [emoji[i].drawings[style] for i, style in self._drawings]
        self._names = [tokenize(one.name) for one in emoji]
        self._keywords = [[tokenize(keyword) for keyword in one.keywords] for one in emoji]

    def __len__(self) -> int:
        return len(self._drawings)

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, _ = self._drawings[index]
        keywords = self._keywords[group]
        kept = (torch.rand(len(keywords)) < KEYWORD_PROBABILITY).tolist()
        chosen = [keyword for keyword, keep in zip(keywords, kept, strict=True) if keep]
        text = torch.cat([self._names[group], *chosen])
        dropped = torch.rand(len(text)) < TOKEN_DROPOUT
        return {
            "image": self._images[index],
            "draws": torch.rand(NUMBER_OF_DRAWS),
            "text": text.masked_fill(dropped, 0),
            "group": group,
            "index": index,
        }


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Return a training batch.

    Returns:
        `image` [B, 3, 32, 32] in [0, 1] up to augmentation, `text` int64 [B, L], `group` int64 [B].
        An emoji has several drawings and captions, so that evaluations need the ids of both:
        `image_id` and `caption_id` [B] are the sample's index.
    """
    images = torch.stack([sample["image"] for sample in samples])
    index = torch.tensor([sample["index"] for sample in samples])
    return {
        "image": augment(images, torch.stack([sample["draws"] for sample in samples])),
        "text": pad_sequence([sample["text"] for sample in samples], batch_first=True),
        "group": torch.tensor([sample["group"] for sample in samples]),
        "image_id": index,
        "caption_id": index,
    }


def unseen_drawings(emoji: Sequence[Emoji]) -> list[Batch]:
    """Return the Twemoji drawings of `unseen_drawing` emoji, then the captions of all emoji."""
    drawings = [(i, "twemoji") for i, one in enumerate(emoji) if one.split == UNSEEN_DRAWING]
    return _image_batches(emoji, drawings) + _caption_batches(emoji, range(len(emoji)))


def unseen_emoji(emoji: Sequence[Emoji]) -> list[Batch]:
    """Return both drawings of the emoji that are not in training, then their captions."""
    unseen = [i for i, one in enumerate(emoji) if one.split == UNSEEN_EMOJI]
    drawings = [(i, style) for i in unseen for style in STYLES]
    return _image_batches(emoji, drawings) + _caption_batches(emoji, unseen)


def unseen_captions(emoji: Sequence[Emoji]) -> list[str]:
    """Return the captions of `unseen_emoji`, as text."""
    return [evaluation_caption(one) for one in emoji if one.split == UNSEEN_EMOJI]


def unseen_pairs(emoji: Sequence[Emoji]) -> list[dict[str, Any]]:
    """Return the drawings of `unseen_drawings` as samples with their captions, for the loss."""
    return [
        {
            "image": one.drawings["twemoji"].float() / 255,
            "text": tokenize(evaluation_caption(one)),
            "group": i,
        }
        for i, one in enumerate(emoji)
        if one.split == UNSEEN_DRAWING
    ]


def collate_pairs(samples: Sequence[dict[str, Any]]) -> Batch:
    """Return a batch of `unseen_pairs`."""
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "text": pad_sequence([sample["text"] for sample in samples], batch_first=True),
        "group": torch.tensor([sample["group"] for sample in samples]),
    }


def evaluation_caption(one: Emoji) -> str:
    """Return the name and all keywords."""
    return " ".join([one.name, *one.keywords])


def _image_batches(emoji: Sequence[Emoji], drawings: Sequence[Drawing]) -> list[Batch]:
    images = torch.stack([emoji[i].drawings[style] for i, style in drawings]).float() / 255
    groups = torch.tensor([i for i, _ in drawings])
    pieces = zip(_split(images), _split(groups), strict=True)
    return [{"image": image, "group": group} for image, group in pieces]


def _caption_batches(emoji: Sequence[Emoji], chosen: Sequence[int]) -> list[Batch]:
    captions = [tokenize(evaluation_caption(emoji[i])) for i in chosen]
    texts = _split(pad_sequence(captions, batch_first=True))
    pieces = zip(texts, _split(torch.tensor(chosen)), strict=True)
    return [{"text": text, "group": group} for text, group in pieces]


def _split(whole: Tensor) -> tuple[Tensor, ...]:
    return torch.split(whole, EVALUATION_BATCH_SIZE)
