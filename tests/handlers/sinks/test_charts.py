"""The charts, and their layout for TensorBoard."""

from __future__ import annotations

import pytest

from diptych.handlers.sinks.charts import (
    CHARTS,
    charts_of,
    curves_by_question,
    custom_scalars_layout,
    results_of,
)


def titles(*tags: str) -> list[str]:
    return [chart.title for chart in charts_of(tags)]


@pytest.mark.parametrize(
    ("tag", "title"),
    [
        ("train/loss", "Loss: train and validation"),
        ("val/loss", "Loss: train and validation"),
        ("val/image_to_text/recall@10", "Recall@10, image to text"),
        ("fit/image_to_text/recall@10", "Recall@10, image to text"),
        ("val/text_to_image/recall@1", "Recall@1, text to image"),
        ("val/recall@5", "Recall@5"),
        ("train/in_batch_accuracy", "Accuracy"),
        ("val/accuracy", "Accuracy"),
        ("health/in_batch_accuracy", "Accuracy within the batch"),
        ("train/contrastive", "Terms of the loss"),
        ("time/samples_per_second", "Samples per second"),
        ("time/data", "Seconds: an update, and waiting for its data"),
        ("train/learning_rate/text", "Learning rate"),
        ("memory/allocated", "Memory, GiB"),
        ("gradients/norm", "Gradient norms"),
        ("gradients/norm/image", "Gradient norms"),
        ("updates/ratio/image", "Updates over weights"),
        ("train/temperature", "Temperature"),
        ("health/margin_of_error/auroc", "AUROC: pairs against negatives"),
        ("health/auroc", "AUROC: pairs against negatives"),
        ("health/image/rank_share", "Dimensions in use, as a share"),
        ("health/loss_over_chance", "Loss over chance"),
        ("health/image/moving", "Weights that move (few at a rate near 0)"),
        ("guard/caught", "Batches that were kept out"),
    ],
)
def test_a_tag_has_one_chart(tag, title):
    assert titles(tag) == [title]


@pytest.mark.parametrize(
    "tag", ["train/logit_scale", "train/bias", "train/stage", "gradients/largest", "x"]
)
def test_a_tag_that_answers_no_question_has_no_chart(tag):
    assert titles(tag) == []


def test_training_and_validation_share_a_chart_and_so_do_test_sets_with_one_k():
    assert titles("train/loss", "val/loss", "fit/loss") == ["Loss: train and validation"]
    sets = [f"{name}/text_to_image/recall@{k}" for name in ("a", "b") for k in (5, 1)]
    assert titles(*sets) == ["Recall@1, text to image", "Recall@5, text to image"]


def test_results_are_the_training_loss_and_what_evaluations_publish():
    others = ["train/temperature", "health/auroc", "time/step", "gradients/norm", "train/lossy"]
    results = ["mine", "train/loss", "val/loss", "val/recall@5", "val/recall@10"]
    assert results_of([*others, *reversed(results)]) == results


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


def test_a_layout_has_its_charts_under_their_questions():
    layout = custom_scalars_layout(charts_of(["train/loss", "val/recall@1", "time/step"]))

    assert {question: list(charts) for question, charts in layout.items()} == {
        "Does it learn?": ["Loss: train and validation", "Recall@1"],
        "How fast?": ["Seconds: an update, and waiting for its data"],
    }
    assert layout["Does it learn?"]["Loss: train and validation"] == [
        "Multiline",
        list(CHARTS[0].tags),
    ]


def test_every_tag_has_a_heading_and_numbers_are_in_order():
    recall = [f"val/image_to_text/recall@{k}" for k in (10, 5, 1)]

    means = ["a/recall@5", "a/recall@1", "b/recall@1"]

    headings = curves_by_question(["x/y", "gradients/norm", *recall, "train/loss", *means])

    assert headings == {
        "Does it learn?": [
            ("Loss: train and validation", ["train/loss"]),
            ("Recall@1", means[1:]),
        ],
        "Is it healthy?": [("Gradient norms", ["gradients/norm"])],
        "Retrieval in detail": [
            ("Recall@1, image to text", recall[2:]),
            ("Recall@5", means[:1]),
            ("Recall@5, image to text", recall[1:2]),
            ("Recall@10, image to text", recall[:1]),
        ],
        "Everything else": [("x/y", ["x/y"])],
    }
