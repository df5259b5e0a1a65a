"""The table at the end of a run: recall in both directions on each split, and chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from examples.emoji.data import Batch

RANKS = (1, 5, 10)


def chance(matches: int, gallery: int, k: int) -> float:
    """Return the probability that k random results include a match.

    Args:
        matches: number of results that match the query.
        gallery: number of all results.
        k: number of results drawn, at most `gallery`.
    """
    return 1 - math.comb(gallery - matches, k) / math.comb(gallery, k)


def results_table(
    recall: Mapping[str, Mapping[str, float]], splits: Mapping[str, Sequence[Batch]]
) -> str:
    """Return the table, one line per split and direction.

    Args:
        recall: for each split, "direction/recall@k" to a value in [0, 1].
        splits: the evaluation batches of each split.
    """
    head = "".join(f"{f'R@{k}':>8}{'chance':>9}" for k in RANKS)
    lines = [f"{'':33}{head}"]
    for split, batches in splits.items():
        images, texts = _groups(batches, "image"), _groups(batches, "text")
        drawings = len(images) // len(images.unique())  # per emoji
        sides = {"image_to_text": (1, len(texts)), "text_to_image": (drawings, len(images))}
        for direction, (matches, gallery) in sides.items():
            cells = (
                f"{recall[split][f'{direction}/recall@{k}']:>8.1%}"
                f"{chance(matches, gallery, k):>9.2%}"
                for k in RANKS
            )
            title = f"{split.replace('_', ' ')}, {direction.replace('_', ' ')}"
            lines.append(f"{title:33}{''.join(cells)}")
    return "\n".join(lines)


def _groups(batches: Sequence[Batch], side: str) -> torch.Tensor:
    return torch.cat([batch["group"] for batch in batches if side in batch])
