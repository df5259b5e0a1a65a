"""The built-in towers: a small residual network for images, a bag of hashed tokens for captions.

In both, the output for a sample does not depend on the other samples of the batch (no batch
normalisation), so cutting a batch into micro-batches changes nothing. They need no extra, train
within minutes on a CPU, and show whether data are usable.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

RELU_GAIN = 1.7139  # sqrt(2 / (1 - 1 / pi)): relu(x) has variance 1 if x is standard normal
GRID = 4
"""The side of the last feature map."""
SMALLEST = 32
"""The smallest side of an image, in pixels."""
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


def tokenize_all(texts: Sequence[str]) -> Tensor:
    """Return the token ids of texts, int64 [B, L], padded with 0; a text without any has one 0."""
    tokens = [tokenize(text) for text in texts]
    longest = max([1, *map(len, tokens)])
    return pad_sequence([*tokens, torch.zeros(longest, dtype=torch.int64)], batch_first=True)[:-1]


class ScaledConv2d(nn.Conv2d):
    """A convolution with weights standardised per output channel, times a learned gain.

    It keeps the scale of its input. This small network needs nothing more of a normalisation layer.

    Source: Brock et al. 2021, arXiv:2101.08692, after Qiao et al. 2019, arXiv:1903.10520.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1
    ) -> None:
        padding = (kernel_size - stride + 1) // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [B, C, H, W]."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        fan_in = self.weight[0].numel()
        weight = (self.weight - mean) * (variance * fan_in + 1e-4).rsqrt() * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut; a stride of 2 halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.first = ScaledConv2d(in_channels, out_channels, 3, stride=stride)
        self.second = ScaledConv2d(out_channels, out_channels, 3)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride), ScaledConv2d(in_channels, out_channels, 1)
            )
        self.weight = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, C', H', W'] of x [B, C, H, W]."""
        residual = self.second(_relu(self.first(x)))
        return _relu(self.shortcut(x) + self.weight * residual)


class ImageEncoder(nn.Module):
    """A residual network: 25 MFLOP per image of 32 x 32 pixels, forward.

    Args:
        dim: dimension of the features.
        width: channels at 16 x 16; twice as many at 8 x 8, four times as many at 4 x 4.
        size: the side of the images, 32 pixels or more. Each doubling has one more convolution.
        mean: of the pixels in [0, 1].
        std: of the pixels.

    Raises:
        ValueError: if `size` is below 32.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 32,
        size: int = SMALLEST,
        mean: float = 0.5,
        std: float = 0.25,
    ) -> None:
        super().__init__()
        if size < SMALLEST:
            raise ValueError(f"size must be >= {SMALLEST} pixels, got {size}")
        self.mean, self.std = mean, std
        halvings = max(1, round(math.log2(size / 16)))
        self.stem = ScaledConv2d(3, width, 4, stride=2)
        further = [ScaledConv2d(width, width, 4, stride=2) for _ in range(halvings - 1)]
        self.further = nn.ModuleList(further)
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, stride=1),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 4 * width, stride=2),
        )
        self.pool = nn.Identity() if size == SMALLEST else nn.AdaptiveAvgPool2d(GRID)
        # All positions instead of their mean: the subject is mostly centred, so that the position
        # of a part matters.
        self.projection = nn.Linear(4 * width * GRID * GRID, dim)
        # Twice as fast on a CPU. The ignore is for torch's annotations, which lack this form.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Tensor:
        """Return features [B, dim] of images [B, 3, size, size] in [0, 1]."""
        image = image.contiguous(memory_format=torch.channels_last)
        hidden = _relu(self.stem((image - self.mean) / self.std))
        for convolution in self.further:
            hidden = _relu(convolution(hidden))
        features: Tensor = self.pool(self.blocks(hidden))
        projected: Tensor = self.projection(features.flatten(start_dim=1))
        return projected


class TextEncoder(nn.Module):
    """The mean embedding of a caption's tokens, then one hidden layer with a shortcut.

    Args:
        dim: dimension of the features.
    """

    def __init__(self, dim: int, *, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(BUCKETS + 1, width, mode="mean", padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, dim)
        )
        self.shortcut = nn.Linear(width, dim)

    def forward(self, text: Tensor) -> Tensor:
        """Return features [B, dim] of token numbers [B, L], padded with 0."""
        mean = self.norm(self.embedding(text))
        features: Tensor = self.hidden(mean) + self.shortcut(mean)
        return features


def _relu(x: Tensor) -> Tensor:
    return F.relu(x) * RELU_GAIN
