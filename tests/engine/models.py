"""Tiny models, losses and batches for the engine's tests, written without `diptych.losses`."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.engine import StepEvents, Trainer, tasks

IMAGE, TEXT, FEATURES = 6, 5, 4


class TwoTower(nn.Module):
    """Two towers of two layers, with what a test wants between the layers."""

    def __init__(self, between: Callable[[], nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(IMAGE, 8), between(), nn.Linear(8, FEATURES))
        self.text = nn.Sequential(nn.Linear(TEXT, 8), between(), nn.Linear(8, FEATURES))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


class RunningScale(nn.Module):
    """Divides by a running size, which every forward pass changes first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("size", torch.ones((), dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("constant", torch.full((2,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.size.mul_(0.5).add_(0.5 * x.abs().mean())
            self.calls += 1
        return torch.tanh(x / self.size.clone())  # one graph holds the sizes of several passes


class CoupledLoss(nn.Module):
    """Symmetric InfoNCE and a spread of features, with two parameters of its own."""

    couples_samples = True

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.4))
        self.spread = nn.Parameter(torch.tensor(0.3))

    def terms(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        logits = self.log_scale.exp() * F.normalize(image) @ F.normalize(text).T
        own = torch.arange(len(logits), device=logits.device)
        contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return {"contrast": contrast, "spread": self.spread * image.var(0).mean()}

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return sum(self.terms(image, text).values(), torch.zeros(()))


class TokenLoss(nn.Module):
    """Cross entropy over the tokens that are not padding (class 0): a mean with unequal weights."""

    couples_samples = False

    def total_and_weight(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(logits.transpose(1, -1), labels, reduction="none", ignore_index=0)
        return losses.sum(), (labels != 0).sum()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        total, weight = self.total_and_weight(logits, labels)
        return total / weight


class SquareLoss(nn.Module):
    """A plain mean over samples with a parameter of its own; it tells no weights."""

    couples_samples = False

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ((self.gain * logits.sum(-1) - labels) ** 2).mean()


class Tokens(nn.Module):
    """Logits [B, T, C] for tokens [B, T]."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 6)
        self.head = nn.Linear(6, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


def paired(samples: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return a batch of image-text pairs."""
    image = torch.randn(samples, IMAGE, dtype=dtype)
    return {"image": image, "text": torch.randn(samples, TEXT, dtype=dtype)}


def sgd(*modules: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    """Return an optimizer of all that the modules learn."""
    return torch.optim.SGD([p for m in modules for p in m.parameters()], lr=lr)


def trainer_of(
    model: nn.Module | None = None, loss: nn.Module | None = None, **settings: Any
) -> Trainer:
    """Return an image-text trainer in float64, unless said otherwise."""
    model = TwoTower().double() if model is None else model
    loss = CoupledLoss().double() if loss is None else loss
    settings.setdefault("task", tasks.image_text)
    settings.setdefault("device", "cpu")
    return Trainer(model, loss, settings.pop("optimizer", sgd(model, loss)), **settings)


def named_parameters(*modules: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters, those of each module under its number."""
    return {f"{i}.{n}": p for i, module in enumerate(modules) for n, p in module.named_parameters()}


def copied_gradients(*modules: nn.Module) -> dict[str, Tensor]:
    """Return copies of the gradients that are there."""
    named = named_parameters(*modules)
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def gradients_of(trainer: Trainer, *batches: Any) -> dict[str, Tensor]:
    """Return the gradients that the last update of one epoch over `batches` applies."""
    found: dict[str, Tensor] = {}

    def read() -> None:
        found.clear()
        found.update(copied_gradients(trainer.model, trainer.loss))

    trainer.add_event_handler(StepEvents.GRADIENTS_READY, read)
    trainer.run(list(batches), max_epochs=1)
    return found


def plain_gradients(
    model: nn.Module,
    loss: nn.Module,
    pieces: Sequence[Any],
    *,
    task: Callable[[nn.Module, Any], dict[str, Tensor]] = tasks.image_text,
) -> dict[str, Tensor]:
    """Return the gradients of one graph over all pieces; the model and the loss change as well."""
    parts = [task(model, piece) for piece in pieces]
    joined = [
        torch.cat(values) if values[0].ndim else values[-1]
        for values in zip(*(part.values() for part in parts), strict=True)
    ]
    loss(*joined).backward()
    return copied_gradients(model, loss)


def twins(*modules: nn.Module) -> list[nn.Module]:
    """Return deep copies, for the oracle."""
    return [copy.deepcopy(module) for module in modules]


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error of a parameter's gradient, relative to its largest entry.

    A gradient that is nothing but rounding (a bias before a batch norm) is measured by the others.
    """
    assert found.keys() == expected.keys()
    sizes = {name: float(value.abs().max()) for name, value in expected.items()}
    floor = 1e-3 * max(sizes.values())
    assert floor > 0
    return max(
        float((found[name] - value).abs().max()) / max(sizes[name], floor)
        for name, value in expected.items()
    )


def stored(state: Any) -> Any:
    """Return a state after a trip through a file, which is read without running any code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
