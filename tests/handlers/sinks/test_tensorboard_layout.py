"""Which curves share a chart, and what TensorBoard is told of it."""

from __future__ import annotations

import pytest

from diptych.handlers.sinks.tensorboard_layout import (
    CHARTS,
    charts_of,
    curves_by_question,
    layout_summary,
)


def titles(*tags: str) -> list[str]:
    return [chart.title for chart in charts_of(tags)]


@pytest.mark.parametrize(
    ("tag", "title"),
    [
        ("train/loss", "Loss: train and validation"),
        ("val/loss", "Loss: train and validation"),
        ("val/image_to_text/recall@10", "Retrieval: image to text"),
        ("val/text_to_image/recall@1", "Retrieval: text to image"),
        ("train/in_batch_accuracy", "Accuracy"),
        ("val/accuracy", "Accuracy"),
        ("train/contrastive", "Terms of the loss"),
        ("time/samples_per_second", "Samples per second"),
        ("time/data", "Seconds: an update, and waiting for its data"),
        ("train/learning_rate/text", "Learning rate"),
        ("memory/allocated", "Memory, GiB"),
        ("gradients/norm", "Gradient norms"),
        ("gradients/norm/image", "Gradient norms"),
        ("updates/ratio/image", "Updates over weights"),
        ("train/temperature", "Temperature"),
        ("health/margin_of_error/auroc", "Pairs against strangers"),
        ("health/auroc", "Pairs against strangers"),
        ("health/image/rank_share", "Dimensions in use, as a share"),
        ("health/loss_over_chance", "Loss over chance"),
        ("guard/caught", "Batches that were kept out"),
    ],
)
def test_a_tag_has_one_chart(tag, title):
    assert titles(tag) == [title]


@pytest.mark.parametrize(
    "tag", ["train/logit_scale", "train/bias", "train/stage", "gradients/largest", "x"]
)
def test_what_answers_none_of_the_questions_has_none(tag):
    assert titles(tag) == []


def test_training_and_validation_share_a_chart():
    assert titles("train/loss", "val/loss", "test/loss") == ["Loss: train and validation"]


def test_charts_keep_their_order_whatever_came_first():
    tags = ["health/auroc", "time/step", "train/loss"]

    assert charts_of(tags) == charts_of(reversed(tags))
    assert [chart.question for chart in charts_of(tags)] == [
        "Does it learn?",
        "How fast?",
        "Is it healthy?",
    ]


def test_titles_differ():
    assert len({chart.title for chart in CHARTS}) == len(CHARTS)


def test_a_layout_reads_back_as_headings_with_charts():
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    (value,) = layout_summary(charts_of(["train/loss", "val/recall@1", "time/step"])).value

    layout = Layout.FromString(value.tensor.string_val[0])
    assert value.metadata.plugin_data.plugin_name == "custom_scalars"
    assert [(c.title, [chart.title for chart in c.chart]) for c in layout.category] == [
        ("Does it learn?", ["Loss: train and validation"]),
        ("How fast?", ["Seconds: an update, and waiting for its data"]),
    ]
    assert list(layout.category[0].chart[0].multiline.tag) == list(CHARTS[0].tags)


def test_every_tag_stands_under_its_question_or_under_the_rest_and_numbers_are_in_order():
    recall = [f"val/image_to_text/recall@{k}" for k in (10, 5, 1)]

    headings = curves_by_question(["x/y", "gradients/norm", *recall, "train/loss"])

    assert headings == {
        "Does it learn?": [
            ("Loss: train and validation", ["train/loss"]),
            ("Retrieval: image to text", recall[::-1]),
        ],
        "Is it healthy?": [("Gradient norms", ["gradients/norm"])],
        "Everything else": [("x/y", ["x/y"])],
    }
