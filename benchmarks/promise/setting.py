"""The model, data set and loss that every library trains in a comparison. Needs only torch.

The other libraries use the usual form of CLIP's loss (arXiv:2103.00020); Diptych uses its own. Both
start at a temperature of 0.07, which is learned.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE, TEXT, FEATURES, CLASSES = 24, 16, 8, 6

Sample = dict[str, Tensor]


class Towers(nn.Module):
    """Two small towers that map images [B, 24] and texts [B, 16] to features [B, 8]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = tower(IMAGE, FEATURES, dropout)
        self.text = tower(TEXT, FEATURES, dropout)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of both sides."""
        return self.image(image), self.text(text)


class Classifier(nn.Module):
    """One small tower that maps images [B, 24] to logits [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.image = tower(IMAGE, CLASSES, dropout=0.0)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.image(image)
        return logits


def tower(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    """Return a perceptron with one hidden layer and no batch norm."""
    return nn.Sequential(
        nn.Linear(inputs, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, outputs)
    )


class UsualCLIPLoss(nn.Module):
    """CLIP's loss as in the pseudocode of its paper, over the given samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(0.07)))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the mean of both cross entropies of the matrix of similarities."""
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        logits = self.log_scale.exp() * image @ text.T
        own = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def contrast(model: nn.Module, loss: nn.Module, batch: Sample) -> Tensor:
    """Return the contrastive loss of a batch of pairs."""
    value: Tensor = loss(*model(batch["image"], batch["text"]))
    return value


def classify(model: nn.Module, loss: nn.Module, batch: Sample) -> Tensor:
    """Return the loss of a batch of labelled images."""
    value: Tensor = loss(model(batch["image"]), batch["label"])
    return value


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Return pairs whose two sides are noisy views of one hidden vector, with its label."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(FEATURES, IMAGE + TEXT, generator=torch.Generator().manual_seed(9))
    hidden = torch.randn(count, FEATURES, generator=generator)
    views = hidden @ maps + 0.5 * torch.randn(count, IMAGE + TEXT, generator=generator)
    image, text = views.split((IMAGE, TEXT), dim=1)
    labels = hidden[:, :CLASSES].argmax(1)
    return [{"image": image[i], "text": text[i], "label": labels[i]} for i in range(count)]


def stacked(chosen: list[Sample]) -> Sample:
    """Return samples as one batch."""
    return {key: torch.stack([sample[key] for sample in chosen]) for key in chosen[0]}


def loss_with(vector: Tensor, model: nn.Module, loss: nn.Module, data: list[Sample]) -> float:
    """Return the loss of all samples as one batch, in eval mode, with the given weights."""
    nn.utils.vector_to_parameters(vector, [*model.parameters(), *loss.parameters()])
    step = contrast if isinstance(model, Towers) else classify
    with torch.no_grad():
        return float(step(model.eval(), loss, stacked(data)))


def weights(*modules: nn.Module) -> Tensor:
    """Return a copy of all parameters in one vector."""
    parameters = [p.detach().flatten() for module in modules for p in module.parameters()]
    return torch.cat(parameters).clone()
