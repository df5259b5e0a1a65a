"""The table at the end of a run: recall in both directions on each split, and chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diptych.engine import Evaluator
from diptych.handlers import RetrievalRecall
from examples.emoji.data import Batch

RANKS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")


def recall_of(
    evaluator: Evaluator, metric: RetrievalRecall, splits: Mapping[str, Sequence[Batch]]
) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Return the metric's values on each split, and those of random features."""
    return {split: (evaluator.evaluate(own), metric.chance) for split, own in splits.items()}


def results_table(results: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]) -> str:
    """Return the table, one line per split and direction.

    Args:
        results: for each split, "direction/recall@k" to a value in [0, 1], and to that of chance.
    """
    head = "".join(f"{f'R@{k}':>8}{'chance':>9}" for k in RANKS)
    lines = [f"{'':33}{head}"]
    for split, (recall, chance) in results.items():
        for direction in DIRECTIONS:
            names = [f"{direction}/recall@{k}" for k in RANKS]
            cells = (f"{recall[name]:>8.1%}{chance[name]:>9.2%}" for name in names)
            title = f"{split.replace('_', ' ')}, {direction.replace('_', ' ')}"
            lines.append(f"{title:33}{''.join(cells)}")
    return "\n".join(lines)
