"""The charts of a run, under three questions, for TensorBoard's Custom Scalars and the report.

A chart shows every tag that its patterns match. The patterns are the same in every run, so
TensorBoard draws the charts of several runs on top of each other. They match a tag whatever the
prefix of its evaluation, which TensorBoard shows as the name of a run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import attrs


@attrs.frozen
class Chart:
    """Curves that are read together.

    Attributes:
        question: the question that the chart answers, used as its heading.
        title: of the chart.
        tags: regular expressions, matched from the beginning of a tag.
    """

    question: str
    title: str
    tags: Sequence[str]

    def shows(self, tag: str) -> bool:
        """Return whether the chart has a curve for a tag."""
        return any(re.match(pattern, tag) for pattern in self.tags)


LEARNS, FAST, HEALTHY = "Does it learn?", "How fast?", "Is it healthy?"
RETRIEVAL = "Retrieval in detail"
REST = "Everything else"
# Tags under train/ that are not terms of the loss.
NOT_A_TERM = (
    r"loss$|learning_rate|stage$|skipped_(steps|batches)$|momentum$|in_batch_accuracy$|linear_probe_"
    r"|(.*/)?(temperature|logit_scale|logit_bias|bias)$"
)
# Tags that no evaluation has published.
NO_RESULT = re.compile(
    r"(?!train/loss$)(train|health|time|memory|gradients|updates|weights|guard)/"
)
DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}

CHARTS = (
    Chart(LEARNS, "Loss: train and validation", [r"(?!health/)([^/]+/)?loss$"]),
    Chart(LEARNS, "Accuracy", [r"(?!health/).*accuracy[^/]*$"]),
    Chart(LEARNS, "Terms of the loss", [rf"train/(?!{NOT_A_TERM})"]),
    Chart(FAST, "Samples per second", [r"time/samples_per_second$"]),
    Chart(FAST, "Seconds: an update, and waiting for its data", [r"time/(step|data)$"]),
    Chart(FAST, "Learning rate", [r"train/learning_rate"]),
    Chart(FAST, "Memory, GiB", [r"memory/"]),
    Chart(HEALTHY, "Gradient norms", [r"gradients/norm(/|$)"]),
    Chart(HEALTHY, "Updates over weights", [r"updates/ratio(/|$)"]),
    Chart(HEALTHY, "Temperature", [r"train/(.*/)?temperature$"]),
    Chart(HEALTHY, "Similarity of pairs", [r"health/(positive_similarity|negative_similarity)$"]),
    Chart(HEALTHY, "AUROC: pairs against negatives", [r"health/(.*/)?auroc$"]),
    Chart(HEALTHY, "Dimensions in use, as a share", [r"health/.+/rank_share$"]),
    Chart(HEALTHY, "Accuracy within the batch", [r"health/in_batch_accuracy$"]),
    Chart(HEALTHY, "Loss over chance", [r"health/loss_over_chance$"]),
    Chart(HEALTHY, "Weights that move (few at a rate near 0)", [r"health/.+/moving$"]),
    Chart(HEALTHY, "Batches that were kept out", [r"guard/", r"train/skipped_"]),
)


def charts_of(tags: Iterable[str]) -> tuple[Chart, ...]:
    """Return the charts that have a curve for at least one of the tags."""
    tags = list(tags)
    found = (re.search(r"recall@(\d+)$", tag) for tag in tags)
    numbers = sorted({int(match[1]) for match in found if match})
    loss, *others = CHARTS
    first = _recall_charts(LEARNS, numbers[0])[:1] if numbers else []
    rest = [chart for k in numbers for chart in _recall_charts(RETRIEVAL, k)]
    charts = (loss, *first, *others, *rest[len(first) :])
    return tuple(chart for chart in charts if any(map(chart.shows, tags)))


def _recall_charts(heading: str, k: int) -> list[Chart]:
    """Return a chart of the mean of both directions, and one of each."""
    mean = rf"((?!{'|'.join(DIRECTIONS)})[^/]+/)?recall@{k}$"
    directions = [
        Chart(heading, f"Recall@{k}, {words}", [rf"(.+/)?{direction}/recall@{k}$"])
        for direction, words in DIRECTIONS.items()
    ]
    return [Chart(heading, f"Recall@{k}", [mean]), *directions]


def results_of(tags: Iterable[str]) -> list[str]:
    """Return the training loss and the tags of evaluations, recall@5 before recall@10."""
    return sorted((tag for tag in tags if not NO_RESULT.match(tag)), key=_natural_order)


def curves_by_question(tags: Iterable[str]) -> dict[str, list[tuple[str, list[str]]]]:
    """Return headings with their charts, each a title and its tags; every tag is in at least one.

    The three questions come first. A tag that answers none of them has a chart of its own, under
    `REST`.
    """
    tags, headings = sorted(tags, key=_natural_order), dict[str, list[tuple[str, list[str]]]]()
    for chart in charts_of(tags):
        shown = [tag for tag in tags if chart.shows(tag)]
        headings.setdefault(chart.question, []).append((chart.title, shown))
    rest = [(tag, [tag]) for tag in tags if not charts_of([tag])]
    return {**headings, **({REST: rest} if rest else {})}


def _natural_order(tag: str) -> list[tuple[int, str]]:
    """Return a sorting key that puts recall@5 before recall@10."""
    parts = re.split(r"(\d+)", tag)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def custom_scalars_layout(charts: Iterable[Chart]) -> dict[str, dict[str, list[Any]]]:
    """Return charts as the layout that `SummaryWriter.add_custom_scalars` takes."""
    layout: dict[str, dict[str, list[Any]]] = {}
    for chart in charts:
        layout.setdefault(chart.question, {})[chart.title] = ["Multiline", list(chart.tags)]
    return layout
