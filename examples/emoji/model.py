"""The two towers of the example, which are the library's small built-in ones."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from diptych.recipes.towers import small_towers

# The mean and the deviation of the drawings' pixels, most of which are white.
ImageEncoder = partial(small_towers.ImageEncoder, mean=0.75, std=0.33)


class TwoTowers(nn.Module):
    """Two towers that map drawings and captions to features for a contrastive loss.

    Args:
        dim: dimension of the features.
    """

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.encode_image = ImageEncoder(dim)
        self.encode_text = small_towers.TextEncoder(dim)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return image features and text features, both [B, dim], not normalised."""
        return self.encode_image(image), self.encode_text(text)
