"""Models, batches and functions that the mistakes are made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych.engine import SeededLoader, Trainer, TrainStep, tasks
from diptych.handlers import (
    CheckpointManager,
    EarlyStopping,
    Evaluation,
    RetrievalRecall,
    default_handlers,
)
from diptych.losses import (
    CLIPLoss,
    CrossEntropyLoss,
)

BATCH = {"image": torch.randn(4, 3), "text": torch.randn(4, 5)}
IMAGES, TOKENS = torch.rand(4, 3, 6, 6), torch.randint(50, (4, 7))
CAPTIONS = ["a cat", "a dog", "a bird", "a fish"]


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.image(image), self.text(text)


class Pictures(nn.Module):
    """A convolution and a table of token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.text = nn.EmbeddingBag(50, 4)

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.image(image), self.text(text)


class LeftBehind(TwoTowers):
    """Holds a tensor that `Module.to` does not move."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(4, device="meta")

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.image(image) * self.scale, self.text(text)


class Normalised(TwoTowers):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.norm(self.image(image)), self.text(text)


class OneFeature(TwoTowers):
    def forward(self, image: Tensor, text: Tensor) -> Any:
        return self.image(image) + self.text(text)


class NoTensor(TwoTowers):
    def forward(self, image: Tensor, text: Tensor) -> Any:
        return "features"


def trainer(
    model: nn.Module | None = None, loss: nn.Module | None = None, **settings: Any
) -> Trainer:
    model, loss = model or TwoTowers(), loss or CLIPLoss()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    settings = {"task": tasks.image_text, "device": "cpu", **settings}
    return Trainer(model, loss, optimizer, **settings)


def run(batch: Any, model: nn.Module | None = None, **settings: Any) -> None:
    trainer(model, **settings).run([batch])


def see(**parts: Any) -> None:
    """Run a batch of pictures and tokens, of which some parts are others."""
    run({"image": IMAGES, "text": TOKENS, **parts}, Pictures())


def classify(labels: Any, loss: nn.Module | None = None) -> None:
    batch = {"image": BATCH["image"], "label": labels}
    run(batch, nn.Linear(3, 3), loss=loss or CrossEntropyLoss(), task=tasks.classification)


def parts_of_trainer() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    model, loss = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))), CLIPLoss()
    return model, loss, torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)


def evaluate(metric: Any) -> None:
    trainer().attach(Evaluation([BATCH], metrics=[metric])).run([BATCH])


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index] for key, value in BATCH.items()}


def sgd(model: nn.Module | None = None) -> torch.optim.Optimizer:
    return torch.optim.SGD((model or TwoTowers()).parameters(), lr=0.1)


def scheduler() -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(sgd(), 1)


def optimizer_of_another_model(_: Path) -> None:
    loss = CLIPLoss()
    optimizer = torch.optim.SGD([*TwoTowers().parameters(), *loss.parameters()], lr=0.1)
    Trainer(TwoTowers(), loss, optimizer, task=tasks.image_text, device="cpu")


def part_replaced_after_the_optimizer(_: Path) -> None:
    model, loss = TwoTowers(), CLIPLoss()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    model.text = nn.Linear(5, 4)
    Trainer(model, loss, optimizer, task=tasks.image_text, device="cpu")


def resumed(folder: Path, model: nn.Module, loss: nn.Module | None = None) -> None:
    """Train and save a model, then resume with another one or another loss."""
    trainer().attach(CheckpointManager(folder / "saved")).run([BATCH])
    TrainStep.update.made = 0  # of the second run alone
    again = trainer(model, loss).attach(CheckpointManager(folder / "saved"))
    again.run([BATCH], max_epochs=2)


def attached_twice(*handlers: Any) -> None:
    trainer().attach(*handlers)


def meta() -> nn.Module:
    with torch.device("meta"):
        return TwoTowers()


def large() -> nn.Module:
    model = TwoTowers()
    model.image, model.text = nn.Linear(3, 6), nn.Linear(5, 6)
    return model


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


class Made(torch.utils.data.Dataset[Any]):
    """Four samples that a function makes."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self._make(index)


def load(make: Callable[[int], Any]) -> None:
    """Load a batch of samples that a function makes."""
    next(iter(SeededLoader(Made(make), 4)))


def weights(folder: Path) -> Path:
    """Return a file with the weights of a model."""
    torch.save(TwoTowers().state_dict(), folder / "weights.pt")
    return folder / "weights.pt"
