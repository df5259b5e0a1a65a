"""The table at the end of a run: recall both ways on each split, beside what chance would give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from examples.emoji.data import Batch

RANKS = (1, 5, 10)


def chance(matches: int, gallery: int, k: int) -> float:
    """Return the probability that k results drawn blindly hold a match.

    Args:
        matches: results that match the query.
        gallery: all results.
        k: results that are looked at, at most `gallery`.
    """
    return 1 - math.comb(gallery - matches, k) / math.comb(gallery, k)


def results_table(
    recall: Mapping[str, Mapping[str, float]], splits: Mapping[str, Sequence[Batch]]
) -> str:
    """Return the table, one line for each split and direction.

    Args:
        recall: of each split, "direction/recall@k" to a share in [0, 1].
        splits: the evaluation batches of each split.
    """
    head = "".join(f"{f'R@{k}':>8}{'chance':>9}" for k in RANKS)
    lines = [f"{'':33}{head}"]
    for split, batches in splits.items():
        images, texts = _groups(batches, "image"), _groups(batches, "text")
        drawings = len(images) // len(images.unique())  # of each emoji
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
