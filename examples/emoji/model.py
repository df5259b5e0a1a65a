"""Two towers: a small residual network for drawings, a bag of hashed tokens for captions.

In both, the output for a sample does not depend on the other samples of the batch (no batch
normalisation), so cutting a batch into micro-batches changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.emoji.text import BUCKETS

RELU_GAIN = 1.7139  # sqrt(2 / (1 - 1 / pi)): relu(x) has variance 1 if x is standard normal
MEAN, STD = 0.75, 0.33  # of the drawings' pixels, most of which are white


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
    """A residual network: 25 MFLOP per 32 x 32 drawing, forward.

    Args:
        dim: dimension of the features.
        width: channels at 16 x 16; twice as many at 8 x 8, four times as many at 4 x 4.
    """

    def __init__(self, dim: int, *, width: int = 32) -> None:
        super().__init__()
        self.stem = ScaledConv2d(3, width, 4, stride=2)
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, stride=1),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 4 * width, stride=2),
        )
        # All positions instead of their mean: emoji are centred, so the position of a part matters.
        self.projection = nn.Linear(4 * width * 4 * 4, dim)
        # Twice as fast on a CPU. The ignore is for torch's annotations, which lack this form.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, image: Tensor) -> Tensor:
        """Return features [B, dim] of drawings [B, 3, 32, 32] in [0, 1]."""
        image = image.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.blocks(_relu(self.stem((image - MEAN) / STD)))
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


class TwoTowers(nn.Module):
    """Two towers that map drawings and captions to features for a contrastive loss.

    Args:
        dim: dimension of the features.
    """

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.encode_image = ImageEncoder(dim)
        self.encode_text = TextEncoder(dim)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return image features and text features, both [B, dim], not normalised."""
        return self.encode_image(image), self.encode_text(text)


def _relu(x: Tensor) -> Tensor:
    return F.relu(x) * RELU_GAIN
