"""Two towers with a shared network on top; tasks for both sides together and for each alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from examples.emoji.data import Batch, collate
from examples.emoji.model import TwoTowers


class FusedTowers(TwoTowers):
    """Two towers with a shared residual network on top, initialised to the identity.

    Args:
        dim: dimension of the features.
    """

    def __init__(self, dim: int = 256) -> None:
        super().__init__(dim)
        self.fusion = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.fusion[2].weight.data.zero_()
        self.fusion[2].bias.data.zero_()


def pairs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A task: the features of the sides in the batch (both in training, one in evaluation)."""
    towers = {"image": model.encode_image, "text": model.encode_text}
    sides = {side: tower(batch[side]) for side, tower in towers.items() if side in batch}
    fused = {f"{side}_features": x + model.fusion(x) for side, x in sides.items()}
    return {**fused, "groups": batch["group"]}


def images(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A task: two augmentations of each drawing."""
    first, second = (model.encode_image(batch[key]) for key in ("image", "second"))
    return {"first": first, "second": second, "groups": batch["group"]}


def captions(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A task: each caption twice, with different dropped tokens (arXiv:2104.08821)."""
    first, second = (model.encode_text(batch["text"]) for _ in range(2))
    return {"first": first, "second": second, "groups": batch["group"]}


def with_second_view(samples: Sequence[dict[str, Any]]) -> Batch:
    """Return a batch; the second augmentation uses the mirrored random numbers of the first."""
    mirrored = [{**sample, "draws": 1 - sample["draws"]} for sample in samples]
    return {**collate(samples), "second": collate(mirrored)["image"]}
