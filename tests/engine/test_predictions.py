"""Predictions and targets for Ignite's metrics: from names, from a task's method, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.metrics import Accuracy, ConfusionMatrix, Fbeta, Loss, MetricGroup, Precision, Recall
from torch import Tensor, nn

from diptych.engine import BatchError, Evaluator, tasks
from diptych.engine.predictions import NamedOutputs, metrics_without_prediction

Batch = dict[str, Tensor]


def labelled(sizes: tuple[int, ...] = (5, 2)) -> list[Batch]:
    return [{"image": torch.randn(n, 4), "label": torch.randint(3, (n,))} for n in sizes]


def evaluated(task: Any, metrics: Any, loader: Any, model: nn.Module | None = None) -> Any:
    model = nn.Linear(4, 3) if model is None else model
    return Evaluator(model, task=task, metrics=metrics, device="cpu").evaluate(loader)


def test_the_metrics_of_ignite_equal_those_of_a_plain_count_of_labelled_samples():
    torch.manual_seed(0)
    model, loader = nn.Linear(4, 3), labelled((40, 9))
    loader[0]["label"][::8] = -100
    metrics = {
        "right": Accuracy(),
        "wrong": 1 - Accuracy(),
        "precision": Precision(average="macro"),
        "recall": Recall(average=False),
        "f1": Fbeta(beta=1.0),
        "group": MetricGroup({"inside": Accuracy()}),
        "matrix": ConfusionMatrix(3),
        "cost": Loss(nn.functional.cross_entropy),
    }
    evaluator = Evaluator(model, task=tasks.classification, metrics=metrics, device="cpu")
    values = evaluator.evaluate(loader)
    labels = torch.cat([batch["label"] for batch in loader])
    images = torch.cat([batch["image"] for batch in loader])
    logits, labels = model(images[labels >= 0]), labels[labels >= 0]
    found = logits.argmax(1)
    matrix = torch.zeros(3, 3, dtype=torch.float64)
    for label, prediction in zip(labels, found, strict=True):
        matrix[label, prediction] += 1
    right = (labels == found).double().mean().item()
    precision = matrix.diag() / matrix.sum(0).clamp(min=1)
    recall = matrix.diag() / matrix.sum(1)
    f1 = 2 * precision * recall / (precision + recall + 1e-15)
    expected = {"right": right, "wrong": 1 - right, "inside": right}
    expected |= {"precision": precision.mean().item(), "f1": f1.mean().item()}
    chosen = logits.log_softmax(1).gather(1, labels[:, None])
    expected["cost"] = -chosen.mean().item()
    assert values == pytest.approx(expected)
    assert torch.equal(evaluator.state.metrics["matrix"].double(), matrix)
    assert torch.allclose(evaluator.state.metrics["recall"].double(), recall)


def test_next_tokens_are_predicted_at_each_position():
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table(tokens)

    model, tokens = Bigram(), torch.randint(5, (4, 7))
    loader = [{"tokens": tokens[:3]}, {"tokens": tokens[3:]}]
    values = evaluated(tasks.next_token, [Accuracy()], loader, model)
    right = model.table.weight[tokens[:, :-1]].argmax(-1) == tokens[:, 1:]
    assert values == pytest.approx({"accuracy": right.double().mean().item()})


class Scores:
    """A task whose outputs have other names."""

    def __call__(self, model: nn.Module, batch: Batch) -> Batch:
        return {"scores": model(batch["image"]), "target": batch["label"]}

    def prediction(self, outputs: Batch) -> tuple[Tensor, Tensor]:
        return outputs["scores"], outputs["target"]


def renamed(model: nn.Module, batch: Batch) -> Batch:
    return {"y_pred": model(batch["image"]), "y": batch["label"]}


def wrapped(model: nn.Module, batch: Batch) -> Batch:
    return tasks.classification(model, batch)


@pytest.mark.parametrize("task", [Scores(), renamed, wrapped, tasks.classification.with_keys()])
def test_a_task_declares_what_it_predicts(task):
    model, loader = nn.Linear(4, 3), labelled()
    labels = torch.cat([batch["label"] for batch in loader])
    right = model(torch.cat([batch["image"] for batch in loader])).argmax(1) == labels
    values = evaluated(task, [Accuracy()], loader, model)
    assert values == pytest.approx({"accuracy": right.double().mean().item()})


@pytest.mark.parametrize("task", [tasks.image_text, tasks.two_views, tasks.huggingface])
def test_a_task_of_features_predicts_nothing(task):
    message = f"for the metrics accuracy, got {type(task).__name__}. Give the evaluation a task"
    with pytest.raises(BatchError, match=message):
        Evaluator(nn.Linear(4, 3), task=task, metrics=[Accuracy()], device="cpu")


def test_outputs_without_a_prediction_are_named_by_the_first_batch():
    def features(model: nn.Module, batch: Batch) -> Batch:
        return {"features": model(batch["image"])}

    message = "y_pred and y, for the metrics accuracy, got features from features"
    with pytest.raises(BatchError, match=message):
        evaluated(features, [Accuracy()], labelled())


def test_a_task_must_return_a_mapping():
    with pytest.raises(BatchError, match="task must return a mapping of named tensors, got float"):
        evaluated(lambda model, batch: model(batch["image"]), [], labelled())


def test_a_metric_with_a_function_of_its_own_needs_no_prediction():
    own = Accuracy(output_transform=lambda o: (o["a"], o["b"]))
    assert metrics_without_prediction({"own": own, "error": 1 - own}) == []
    assert metrics_without_prediction({"own": Accuracy(), "error": 1 - Accuracy()}) == [
        "own",
        "error",
    ]


def test_the_names_are_no_part_of_the_outputs():
    outputs = NamedOutputs({"logits": torch.eye(2), "labels": torch.arange(2)}, wrapped)
    assert list(outputs) == ["logits", "labels"]
    assert len(outputs.values()) == 2
    assert outputs["y"] is outputs["labels"]
    with pytest.raises(KeyError, match=r"^output_transform must .* logits, labels, got 'x'$"):
        outputs["x"]
