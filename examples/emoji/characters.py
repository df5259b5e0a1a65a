"""The names and keywords of emoji as characters, for language models."""

from __future__ import annotations

import string
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from examples.emoji.data import Batch, Emoji

PAD, EDGE, OTHER = 0, 1, 2
"""The tokens for padding, for the start and end of a text, and for a rare character."""

ALPHABET = string.ascii_lowercase + string.digits + " ,:-&"
CHARACTERS = 3 + len(ALPHABET)


def encode(text: str) -> Tensor:
    """Return the tokens of a text's characters, with EDGE before and after, int64 [L + 2]."""
    inner = [ALPHABET.find(c) + 3 if c in ALPHABET else OTHER for c in text.lower()]
    return torch.tensor([EDGE, *inner, EDGE])


def decode(tokens: Tensor) -> str:
    """Return the text between the first EDGE and the next one."""
    text = ""
    for token in tokens[1:].tolist():
        if token in (EDGE, PAD):
            break
        text += ALPHABET[token - 3] if token > OTHER else "?"
    return text


def description(one: Emoji) -> str:
    """Return the name and the keywords: "lion: animal, roar"."""
    return f"{one.name}: {', '.join(one.keywords)}"


class Descriptions(Dataset[Tensor]):
    """The description of each emoji, as characters."""

    def __init__(self, emoji: Sequence[Emoji]) -> None:
        self._texts = [encode(description(one)) for one in emoji]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Tensor:
        return self._texts[index]


def collate_texts(texts: Sequence[Tensor]) -> Batch:
    """Return `tokens` [B, L], padded with PAD."""
    return {"tokens": pad_sequence(list(texts), batch_first=True)}
