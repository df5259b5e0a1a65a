"""Self-supervised learning: features from two views, without labels, evaluated with a probe.

python -m examples.self_supervised --method byol
"""

import argparse
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diptych.engine import Evaluator, SeededLoader, Trainer, tasks
from diptych.handlers import (
    KNNAccuracy,
    LearningRate,
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


class Views(nn.Module):
    """An encoder with a projection head, a momentum target of both, and a predictor head."""

    def __init__(self, *, centred: bool = False) -> None:
        super().__init__()
        # Without batch norm, all targets share a direction, and BYOL learns to predict that first.
        last = nn.BatchNorm1d(WIDTH) if centred else nn.Identity()
        self.online = nn.Sequential(ImageEncoder(WIDTH, width=16), Projection(**HEAD), last)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = Projection(**HEAD)

    def forward(self, image: Tensor) -> Tensor:
        """Return projected features [B, WIDTH] of drawings [B, 3, 32, 32]."""
        return self.online(image)


def queries_and_keys(model: Views, batch: Batch) -> Batch:
    """The task of MoCo: one view through the encoder, the other through the momentum encoder."""
    query, key = model.online(batch["first"]), model.target(batch["second"])
    # With groups, earlier keys of the same emoji are not negatives.
    return {"query": query, "key": key, "groups": batch["group"]}


def predictions_and_targets(model: Views, batch: Batch) -> Batch:
    """The task of BYOL: each view predicts the target of the other view."""
    views = torch.cat([batch["first"], batch["second"]])
    targets = model.target(views).roll(len(views) // 2, dims=0)
    return {"predictions": model.predictor(model.online(views)), "targets": targets}


def labelled(model: Views, batch: Batch) -> Batch:
    """The task of the probe: return the features below the projection head."""
    return {"features": model.online[0](batch["image"]), "labels": batch["label"]}


METHODS = {  # the loss, its arguments, and the task
    "simclr": ("simclr", {"temperature": 0.2}, tasks.two_views),
    "vicreg": ("vicreg", {}, tasks.two_views),
    "barlow_twins": ("barlow_twins", {"redundancy_weight": 0.02}, tasks.two_views),
    "moco": ("moco", {"dim": WIDTH, "queue_size": 1024}, queries_and_keys),
    "byol": ("negative_cosine", {"kind": "byol"}, predictions_and_targets),
}


def main(method: str, emoji: Sequence[Emoji], epochs: int = EPOCHS) -> dict[str, float]:
    """Train; return the probe's accuracy before and after, and that of a constant prediction."""
    torch.manual_seed(0)
    (name, arguments, task), views = METHODS[method], labels.TwoDrawings(emoji)
    model, loss = Views(centred=method == "byol"), get_loss(name, **arguments)
    loader = SeededLoader(views, 128, seed=0, drop_last=True, collate=labels.collate_views)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=1e-4, lr=2e-3))
    trainer = Trainer(model, loss, optimizer, task=task, seed=0)
    trainer.attach(LearningRate(warmup=len(loader)), *default_handlers(new_run("runs", method)))
    if method in ("moco", "byol"):
        trainer.attach(MomentumEncoder(momentum=0.97, schedule="cosine"))

    bank = labels.labelled_batches(emoji, training_drawings(emoji))
    unseen = labels.labelled_batches(emoji, labels.unseen_emoji_drawings(emoji))
    probe = Evaluator(model, task=labelled, metrics={"kNN": KNNAccuracy(bank, k=20)})
    results = {"constant": labels.largest_share(unseen), "untrained": probe.evaluate(unseen)["kNN"]}
    trainer.run(loader, max_epochs=epochs)
    return {**results, "trained": probe.evaluate(unseen)["kNN"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="simclr")
    for name, accuracy in main(parser.parse_args().method, read_emoji()).items():
        print(f"{name:10} {accuracy:6.1%}")
