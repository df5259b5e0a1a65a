"""Turns a caption into numbers: hashed words and letter trigrams, with no vocabulary to store."""

from __future__ import annotations

import re
import zlib

import torch
from torch import Tensor

BUCKETS = 8192
"""Numbers that a token can have, from 1 on; 0 pads a caption to the length of its batch."""


def tokenize(text: str) -> Tensor:
    """Return the numbers of a text's words and of the trigrams of each, int64 [L].

    A trigram sees the edges of its word: "ski" holds "<sk", "ski" and "ki>", and so shares two of
    them with "skis". That carries over to words that no caption in training had.
    """
    words = re.findall(r"\w+|[#*!?&+]", text.lower())
    bounded = [f"<{word}>" for word in words]
    trigrams = [word[i : i + 3] for word in bounded for i in range(len(word) - 2)]
    # crc32 rather than hash(), which differs from one Python process to the next.
    numbers = [1 + zlib.crc32(token.encode()) % BUCKETS for token in bounded + trigrams]
    return torch.tensor(numbers, dtype=torch.int64)
