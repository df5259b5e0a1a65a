"""Drawings with names as words, for captioning models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from examples.emoji.augment import NUMBER_OF_DRAWS, augment
from examples.emoji.data import Batch, Drawing, Emoji, training_drawings

PAD, EDGE, OTHER = 0, 1, 2
"""The tokens for padding, for the start and end of a name, and for an unknown word."""


class Words:
    """The vocabulary: the words of the training names, each with a token."""

    def __init__(self, emoji: Sequence[Emoji]) -> None:
        names = [emoji[i].name for i, _ in training_drawings(emoji)]
        self._words = sorted({word for name in names for word in split(name)})
        self._numbers = {word: i for i, word in enumerate(self._words, start=3)}

    def __len__(self) -> int:
        return 3 + len(self._words)

    def encode(self, name: str) -> Tensor:
        """Return the tokens of a name's words, with EDGE before and after, int64 [L + 2]."""
        return torch.tensor([EDGE, *(self._numbers.get(w, OTHER) for w in split(name)), EDGE])

    def decode(self, tokens: Tensor) -> str:
        """Return the words between the first EDGE and the next one."""
        words = []
        for token in tokens[1:].tolist():
            if token in (EDGE, PAD):
                break
            words.append("?" if token == OTHER else self._words[token - 3])
        return " ".join(words)


def split(name: str) -> list[str]:
    """Return the words of a name, in lower case and without punctuation."""
    return re.findall(r"[\w#*]+", name.lower())


def overlap(names: Sequence[str], others: Sequence[str]) -> float:
    """Return the mean Jaccard index of the words of two names."""
    pairs = [(set(a.split()), set(b.split())) for a, b in zip(names, others, strict=True)]
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)


class NamedDrawings(Dataset[dict[str, Any]]):
    """A data set of the training drawings, each with the name of its emoji."""

    def __init__(self, emoji: Sequence[Emoji], words: Words) -> None:
        self._drawings = training_drawings(emoji)
        self._images = [emoji[i].drawings[style] for i, style in self._drawings]
        self._names = [words.encode(one.name) for one in emoji]

    def __len__(self) -> int:
        return len(self._drawings)

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, _ = self._drawings[index]
        draws = torch.rand(NUMBER_OF_DRAWS)
        image, tokens = self._images[index], self._names[group]
        return {"image": image, "draws": draws, "tokens": tokens, "group": group}


def collate_named(samples: Sequence[dict[str, Any]]) -> Batch:
    """Return `image` [B, 3, 32, 32], augmented, `tokens` [B, L] and `group` [B]."""
    images = torch.stack([sample["image"] for sample in samples])
    return {
        "image": augment(images, torch.stack([sample["draws"] for sample in samples])),
        "tokens": pad_sequence([sample["tokens"] for sample in samples], batch_first=True),
        "group": torch.tensor([sample["group"] for sample in samples]),
    }


def named_batch(emoji: Sequence[Emoji], drawings: Sequence[Drawing], words: Words) -> Batch:
    """Return one batch of drawings with their names, not augmented."""
    images = torch.stack([emoji[i].drawings[style] for i, style in drawings])
    names = pad_sequence([words.encode(emoji[i].name) for i, _ in drawings], batch_first=True)
    groups = torch.tensor([i for i, _ in drawings])
    return {"image": images.float() / 255, "tokens": names, "group": groups}
