"""Which curves of a run stand in one chart, so that TensorBoard's first screen tells how it fares.

A chart takes every tag that its expressions match. The expressions are the same in every run, so
that TensorBoard lays the charts of several runs over each other.
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
        question: which of the three questions it answers; the heading that it stands under.
        title: of the chart.
        tags: regular expressions, matched from a tag's beginning.
    """

    question: str
    title: str
    tags: Sequence[str]

    def shows(self, tag: str) -> bool:
        """Say whether the chart has a curve for a tag."""
        return any(re.match(pattern, tag) for pattern in self.tags)


LEARNS, FAST, HEALTHY = "Does it learn?", "How fast?", "Is it healthy?"
REST = "Everything else"
# What stands beside the terms of a loss under train/ and is none.
NO_TERM = (
    r"loss$|learning_rate|stage$|skipped_steps$|momentum$|in_batch_accuracy$|linear_probe_"
    r"|(.*/)?(temperature|logit_scale|logit_bias|bias)$"
)

CHARTS = (
    Chart(LEARNS, "Loss: train and validation", [r"(?!health/)[^/]+/loss$"]),
    Chart(LEARNS, "Retrieval: image to text", [r".+/image_to_text/recall@\d+$"]),
    Chart(LEARNS, "Retrieval: text to image", [r".+/text_to_image/recall@\d+$"]),
    Chart(LEARNS, "Accuracy", [r".*accuracy[^/]*$"]),
    Chart(LEARNS, "Terms of the loss", [rf"train/(?!{NO_TERM})"]),
    Chart(FAST, "Samples per second", [r"time/samples_per_second$"]),
    Chart(FAST, "Seconds: an update, and waiting for its data", [r"time/(step|data)$"]),
    Chart(FAST, "Learning rate", [r"train/learning_rate"]),
    Chart(FAST, "Memory, GiB", [r"memory/"]),
    Chart(HEALTHY, "Gradient norms", [r"gradients/norm(/|$)"]),
    Chart(HEALTHY, "Updates over weights", [r"updates/ratio(/|$)"]),
    Chart(HEALTHY, "Temperature", [r"train/(.*/)?temperature$"]),
    Chart(HEALTHY, "Similarity of pairs", [r"health/(positive_similarity|negative_similarity)$"]),
    Chart(HEALTHY, "Pairs against strangers", [r"health/(.*/)?auroc$"]),
    Chart(HEALTHY, "Dimensions in use, as a share", [r"health/.+/rank_share$"]),
    Chart(HEALTHY, "Loss over chance", [r"health/loss_over_chance$"]),
    Chart(HEALTHY, "Weights that move, as a share", [r"health/.+/moving$"]),
    Chart(HEALTHY, "Batches that were kept out", [r"guard/", r"train/skipped_steps$"]),
)


def charts_of(tags: Iterable[str]) -> tuple[Chart, ...]:
    """Return the charts that have a curve for at least one of the tags."""
    tags = list(tags)
    return tuple(chart for chart in CHARTS if any(map(chart.shows, tags)))


def curves_by_question(tags: Iterable[str]) -> dict[str, list[tuple[str, list[str]]]]:
    """Return heading to charts, each a title and its tags, in order; every tag is in one or more.

    The three questions come first, then under `REST` whatever tag answers none of them, in a chart
    of its own.
    """
    left, headings = sorted(tags, key=_with_numbers), dict[str, list[tuple[str, list[str]]]]()
    for chart in charts_of(left):
        shown = [tag for tag in left if chart.shows(tag)]
        headings.setdefault(chart.question, []).append((chart.title, shown))
    rest = [(tag, [tag]) for tag in left if not charts_of([tag])]
    return {**headings, **({REST: rest} if rest else {})}


def _with_numbers(tag: str) -> list[tuple[int, str]]:
    """Return what sorts recall@5 before recall@10."""
    parts = re.split(r"(\d+)", tag)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def layout_summary(charts: Iterable[Chart]) -> Any:
    """Return the charts as the summary that TensorBoard's tab "Custom Scalars" reads."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # noqa: PLC0415
    from tensorboard.compat.proto.tensor_pb2 import TensorProto  # noqa: PLC0415
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata  # noqa: PLC0415

    layout = layout_pb2.Layout()
    categories: dict[str, Any] = {}
    for chart in charts:
        if chart.question not in categories:
            categories[chart.question] = layout.category.add(title=chart.question)
        content = layout_pb2.MultilineChartContent(tag=chart.tags)
        categories[chart.question].chart.add(title=chart.title, multiline=content)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    summary = Summary()
    summary.value.add(
        tag=metadata.CONFIG_SUMMARY_TAG,
        metadata=SummaryMetadata(plugin_data=plugin),
        tensor=TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()]),
    )
    return summary
