"""A tokenizer without a vocabulary: hashed words and letter trigrams."""

from __future__ import annotations

import re
import zlib

import torch
from torch import Tensor

BUCKETS = 8192
"""The number of different token ids, from 1 on; 0 is padding."""


def tokenize(text: str) -> Tensor:
    """Return the token ids of a text's words and of their trigrams, int64 [L].

    Trigrams include the edges of a word: "ski" has "<sk", "ski" and "ki>", and shares two of them
    with "skis". This generalises to words that are not in any training caption.
    """
    words = re.findall(r"\w+|[#*!?&+]", text.lower())
    bounded = [f"<{word}>" for word in words]
    trigrams = [word[i : i + 3] for word in bounded for i in range(len(word) - 2)]
    # crc32 instead of hash(), which differs between Python processes.
    numbers = [1 + zlib.crc32(token.encode()) % BUCKETS for token in bounded + trigrams]
    return torch.tensor(numbers, dtype=torch.int64)
