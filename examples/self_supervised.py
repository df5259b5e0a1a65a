"""Self-supervised learning: features from views, without labels, evaluated with two probes.

python -m examples.self_supervised --method byol
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.engine import Evaluator, Handler, SeededLoader, Trainer, tasks
from diptych.handlers import (
    Curriculum,
    KNNAccuracy,
    LearningRate,
    LinearProbeAccuracy,
    MomentumEncoder,
    default_handlers,
    new_run,
    parameter_groups,
)
from diptych.losses import Projection, get_loss
from examples.emoji import labels
from examples.emoji.data import Batch, Emoji, read_emoji, training_drawings
from examples.emoji.model import ImageEncoder

WIDTH, EPOCHS = 256, 60
HEAD = {"input_dim": WIDTH, "hidden_dim": 512, "output_dim": WIDTH, "normalization": "batch"}
PROTOTYPES = 1024


class Views(nn.Module):
    """An encoder with a projection head."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(ImageEncoder(WIDTH, width=16), *self.head())

    def head(self) -> list[nn.Module]:
        """Return new layers between the encoder and the loss."""
        return [Projection(**HEAD)]

    def forward(self, image: Tensor) -> Tensor:
        """Return the head's results [B, D] for drawings [B, 3, 32, 32]."""
        return self.online(image)


class Embeddings(Views):
    """An encoder with a head of few dimensions, which a batch can show to be normal."""

    def head(self) -> list[nn.Module]:
        """Return a narrow projection."""
        return [Projection(**{**HEAD, "output_dim": 64})]


class WithTarget(Views):
    """An encoder with its head, and a momentum target of both."""

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.online).requires_grad_(False)


class WithPredictor(WithTarget):
    """An encoder with its head, a momentum target of both, and a predictor of the target."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor = Projection(**HEAD)

    def head(self) -> list[nn.Module]:
        """Return a projection with centred results."""
        # Without batch norm, all targets share a direction, and BYOL learns to predict that first.
        return [Projection(**HEAD), nn.BatchNorm1d(WIDTH)]


class WithPrototypes(WithTarget):
    """An encoder with a head of logits over prototypes, and a momentum target of both."""

    def head(self) -> list[nn.Module]:
        """Return a projection and prototypes."""
        return [Projection(**HEAD), Prototypes()]


class Prototypes(nn.Module):
    """The cosines of features with learned prototypes: DINO's last, weight-normed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, WIDTH))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, PROTOTYPES] of features [B, WIDTH]."""
        return F.normalize(features) @ F.normalize(self.prototypes).T


def queries_and_keys(model: WithTarget, batch: Batch) -> Batch:
    """The task of MoCo: one view through the encoder, the other through the momentum encoder."""
    query, key = model.online(batch["first"]), model.target(batch["second"])
    # With groups, earlier keys of the same emoji are not negatives.
    return {"query": query, "key": key, "groups": batch["group"]}


def predictions_and_targets(model: WithPredictor, batch: Batch) -> Batch:
    """The task of BYOL: each view predicts the target of the other view."""
    views = torch.cat([batch["first"], batch["second"]])
    targets = model.target(views).roll(len(views) // 2, dims=0)
    return {"predictions": model.predictor(model.online(views)), "targets": targets}


def labelled(model: Views, batch: Batch) -> Batch:
    """The task of the probes: return the features below the projection head."""
    return {"features": model.online[0](batch["image"]), "labels": batch["label"]}


METHODS = {  # the loss, its arguments, the task, and the model
    "simclr": ("simclr", {"temperature": 0.2}, tasks.two_views, Views),
    "vicreg": ("vicreg", {}, tasks.two_views, Views),
    "barlow_twins": ("barlow_twins", {"redundancy_weight": 0.02}, tasks.two_views, Views),
    "moco": ("moco", {"dim": WIDTH, "queue_size": 1024}, queries_and_keys, WithTarget),
    "byol": ("negative_cosine", {"kind": "byol"}, predictions_and_targets, WithPredictor),
    "dino": ("dino", {"dim": PROTOTYPES}, tasks.multi_crop, WithPrototypes),
    "sigreg": ("sigreg", {"global_views": 2}, tasks.multi_crop, Embeddings),
}

ZOOM = {"dino": 1.5, "sigreg": 1.0}  # of small crops; with details, SIGReg loses 7 points


def loader_of(method: str, emoji: Sequence[Emoji], seed: int) -> SeededLoader:
    """Return batches of two views, or of two large and two small crops: four views."""
    views = labels.ManyViews(emoji, 4 if method in ZOOM else 2)
    collate: Callable[..., Batch] = labels.collate_views
    if method in ZOOM:
        collate = partial(labels.collate_crops, zoom=ZOOM[method])
    return SeededLoader(views, 128, seed=seed, drop_last=True, collate=collate)


def handlers_of(method: str, model: Views, loader: SeededLoader) -> list[Handler]:
    """Return the learning rate and, for some methods, the target and its temperature."""
    handlers: list[Handler] = [LearningRate(warmup=len(loader))]
    if isinstance(model, WithTarget):
        handlers.append(MomentumEncoder(momentum=0.97, schedule="cosine"))
    if method == "dino":
        warmup = 10 * len(loader)
        handlers.append(Curriculum("loss.teacher_temperature", start=0.04, end=0.07, over=warmup))
    return handlers


def main(
    method: str, emoji: Sequence[Emoji], epochs: int = EPOCHS, seed: int = 0
) -> dict[str, float]:
    """Train; return the probes' accuracies before and after, and that of a constant prediction."""
    torch.manual_seed(seed)
    name, arguments, task, build = METHODS[method]
    model, loss, loader = build(), get_loss(name, **arguments), loader_of(method, emoji, seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=1e-4, lr=2e-3))
    trainer = Trainer(model, loss, optimizer, task=task, seed=seed)
    trainer.attach(*handlers_of(method, model, loader), *default_handlers(new_run("runs", method)))

    bank = labels.labelled_batches(emoji, training_drawings(emoji))
    unseen = labels.labelled_batches(emoji, labels.unseen_emoji_drawings(emoji))
    probes = {"kNN": KNNAccuracy(bank, k=20), "linear": LinearProbeAccuracy(bank)}
    evaluator = Evaluator(model, task=labelled, metrics=probes)
    results = {"constant": labels.largest_share(unseen)}
    results |= {f"untrained, {probe}": value for probe, value in evaluator.evaluate(unseen).items()}
    trainer.run(loader, max_epochs=epochs)
    return {**results, **evaluator.evaluate(unseen)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="simclr")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, accuracy in main(options.method, read_emoji(), seed=options.seed).items():
        print(f"{name:20} {accuracy:6.1%}")
