"""Plausible mistakes: each raises an error that names the argument, the value and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import (
    CheckpointManager,
    EarlyStopping,
    Evaluation,
    JsonLines,
    RetrievalRecall,
    TensorBoard,
    default_handlers,
)
from diptych.losses import CLIPLoss, get_loss

BATCH = {"image": torch.randn(4, 3), "text": torch.randn(4, 5)}


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.image(image), self.text(text)


class OneFeature(TwoTowers):
    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.image(image) + self.text(text)


class NoTensor(TwoTowers):
    def forward(self, image: Tensor, text: Tensor) -> Any:
        return "features"


def trainer(model: nn.Module | None = None, **settings: Any) -> Trainer:
    model, loss = model or TwoTowers(), CLIPLoss()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    return Trainer(model, loss, optimizer, task=tasks.image_text, device="cpu", **settings)


def run(batch: dict[str, Tensor], model: nn.Module | None = None) -> None:
    trainer(model).run([batch])


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index] for key, value in BATCH.items()}


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD(TwoTowers().parameters(), lr=0.1)


def frozen(_: Path) -> None:
    trained = trainer()
    trained.model.requires_grad_(False)
    trained.loss.requires_grad_(False)
    trained.run([BATCH])


def loss_without_its_parameters(_: Path) -> None:
    model = TwoTowers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, CLIPLoss(), optimizer, task=tasks.image_text, device="cpu")


def unpublished_best_metric(folder: Path) -> None:
    evaluation = Evaluation([BATCH], metrics=[RetrievalRecall(k=(1,))])
    manager = CheckpointManager(folder, best="val/recal@1")
    trainer().attach(evaluation, manager).run([BATCH])


def folder_that_is_a_file(folder: Path) -> None:
    (folder / "runs").write_text("a file")
    trainer().attach(*default_handlers(folder / "runs" / "a")).run([BATCH])


def file_in(folder: Path) -> Path:
    path = folder / "a_file"
    path.write_text("not a folder")
    return path


def unpublished_patience_metric(_: Path) -> None:
    trainer().attach(EarlyStopping(metric="val/nothing", patience=1)).run([BATCH])


MISTAKES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a wrong key": (
        lambda _: run({"picture": BATCH["image"], "text": BATCH["text"]}),
        ["'image'", "'picture', 'text'", "with_keys(image=...)"],
    ),
    "images and texts of different number": (
        lambda _: run({"image": torch.randn(4, 3), "text": torch.randn(3, 5)}),
        ["one row for each pair", "(4, 4) and (3, 4)"],
    ),
    "a loss whose parameters the optimizer lacks": (
        loss_without_its_parameters,
        ["optimizer must hold the loss's parameters", "*loss.parameters()"],
    ),
    "a misspelt loss": (lambda _: get_loss("clipp"), ["'clipp'", "Did you mean 'clip'"]),
    "a best metric that is never published": (
        unpublished_best_metric,
        ["best must be a metric that the run publishes", "'val/recal@1'", "val/recall@1"],
    ),
    "an early-stopping metric that is never published": (
        unpublished_patience_metric,
        ["metric must be a metric that the run publishes", "'val/nothing'", "train/loss"],
    ),
    "an empty loader": (
        lambda _: trainer().run([]),
        ["data must have at least one batch", "an empty loader"],
    ),
    "a folder that cannot be written": (
        folder_that_is_a_file,
        [
            "directory",
            "runs/a/checkpoints",
            "cannot be written",
            "Not a directory",
            "Use another directory",
        ],
    ),
    "a handler without attach": (
        lambda _: trainer().attach(print),
        ["attach(trainer)", "print", "trainer.add_event_handler(event, function)"],
    ),
    "a metric that is not in a list": (
        lambda _: trainer().attach(Evaluation([BATCH], metrics=RetrievalRecall())).run([BATCH]),
        ["metrics must be a sequence or a mapping", "RetrievalRecall", "metrics=[...]"],
    ),
    "a metric's class": (
        lambda _: trainer().attach(Evaluation([BATCH], metrics=[RetrievalRecall])).run([BATCH]),
        ["a metric must be", "RetrievalRecall()"],
    ),
    "a best metric without its prefix": (
        lambda folder: (
            trainer()
            .attach(
                Evaluation([BATCH], metrics=[RetrievalRecall(k=(1,))]),
                CheckpointManager(folder, best="recall@1"),
            )
            .run([BATCH])
        ),
        ["'recall@1'", "val/recall@1"],
    ),
    "groups that are names": (
        lambda _: run({**BATCH, "group": ["a", "b", "c", "d"]}),
        ["groups must be a tensor with an integer for each sample", "a list", "Number the groups"],
    ),
    "labels that are names": (
        lambda _: tasks.classification(nn.Linear(3, 2), {"image": torch.ones(1, 3), "label": "a"}),
        ["labels must be a tensor with an integer for each sample", "got a str"],
    ),
    "epochs as a text": (
        lambda _: trainer().run([BATCH], max_epochs="3"),
        ["max_epochs must be a whole number, got '3'"],
    ),
    "a handler's class": (
        lambda _: trainer().attach(EarlyStopping),
        ["attach(trainer)", "Make an instance: EarlyStopping(...)"],
    ),
    "a list of handlers": (
        lambda folder: trainer().attach(default_handlers(folder)),
        ["attach(trainer)", "trainer.attach(*handlers)"],
    ),
    "TensorBoard on a file": (
        lambda folder: trainer().attach(TensorBoard(file_in(folder))).run([BATCH]),
        ["a_file cannot be", "File exists", "another"],
    ),
    "JSON lines below a file": (
        lambda folder: trainer().attach(JsonLines(file_in(folder) / "run")).run([BATCH]),
        ["a_file/run cannot be", "Not a directory", "another"],
    ),
    "a model that returns one feature": (
        lambda _: run(BATCH, OneFeature()),
        ["model must return (image_features, text_features)", "one tensor (4, 4)"],
    ),
    "a data set instead of a loader": (
        lambda _: trainer().run(Samples(), max_epochs=1),
        [
            "data must be an iterable of batches, got a Samples",
            "SeededLoader(dataset, batch_size=...)",
        ],
    ),
    "a loader in a loader": (
        lambda _: SeededLoader(torch.utils.data.DataLoader(Samples()), 2),
        ["dataset must be a map-style data set", "got a DataLoader", "as it is"],
    ),
    "an iterator as a data set": (
        lambda _: SeededLoader(iter([1]), 2),
        ["dataset must be a map-style data set", "list_iterator"],
    ),
    "NumPy arrays in a batch": (
        lambda _: run({key: value.numpy() for key, value in BATCH.items()}),
        ["must hold a tensor", "dict of [ndarray]", "torch.from_numpy"],
    ),
    "labels for a contrastive loss": (
        lambda _: CLIPLoss()(torch.randn(4, 3), torch.arange(4)),
        ["second must be floating point", "CrossEntropyLoss or SupervisedContrastiveLoss"],
    ),
    "a loss's class": (
        lambda _: Trainer(TwoTowers(), CLIPLoss, sgd(), task=print),
        ["loss must be a torch Module", "the class CLIPLoss", "CLIPLoss(...)"],
    ),
    "loss and optimizer in each other's place": (
        lambda _: Trainer(TwoTowers(), sgd(), CLIPLoss(), task=print),
        ["loss must be a torch Module, got a SGD", "Trainer(model, loss, optimizer, task=...)"],
    ),
    "everything is frozen": (
        frozen,
        ["the loss must depend on a trainable parameter", "requires_grad_(True)"],
    ),
    "a batch size for the trainer": (
        lambda _: trainer(batch_size=8),
        ["got batch_size", "SeededLoader(dataset, batch_size=...)"],
    ),
    "a callback for the trainer": (
        lambda _: trainer(callbacks=[]),
        ["got callbacks", "trainer.attach(handler, ...)"],
    ),
    "a model that returns no tensor": (
        lambda _: run(BATCH, NoTensor()),
        ["model must return (image_features, text_features)", "got a str"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_an_error_with_the_value_and_what_to_do(mistake, tmp_path):
    make, words = MISTAKES[mistake]

    with pytest.raises(Exception) as caught:  # noqa: PT011 - the words are what is checked
        make(tmp_path)

    assert [word for word in words if word not in str(caught.value)] == []


def test_fp16_on_a_cpu_without_it_is_an_error_with_the_precisions_it_has(monkeypatch):
    def cannot(*_: object, **__: object) -> None:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch, "autocast", cannot)

    with pytest.raises(ValueError, match="precision must be fp32 or bf16 on this cpu device"):
        trainer(precision="fp16")
