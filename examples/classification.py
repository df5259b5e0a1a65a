"""Classification: learn the category of an emoji, by cross entropy or supervised contrastive.

python -m examples.classification --loss supervised_contrastive
"""

import argparse
from collections.abc import Sequence

import torch
from ignite.metrics import Accuracy
from torch import Tensor, nn

from diptych.engine import Evaluator, SeededLoader, Trainer, tasks
from diptych.handlers import (
    Evaluation,
    KNNAccuracy,
    LearningRate,
    WeightAverage,
    default_handlers,
    new_run,
    parameter_groups,
)
from diptych.losses import CrossEntropyLoss, SupervisedContrastiveLoss
from examples.emoji import labels
from examples.emoji.data import Batch, Emoji, read_emoji, training_drawings
from examples.emoji.model import ImageEncoder

WIDTH, BATCH_SIZE, EPOCHS = 256, 128, 20
LOSSES = {
    "cross_entropy": lambda: CrossEntropyLoss(label_smoothing=0.1),
    "supervised_contrastive": lambda: SupervisedContrastiveLoss(temperature=0.1),
}


class Classifier(nn.Module):
    """An encoder, and a layer that returns logits or, for the contrastive loss, features."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.encoder = ImageEncoder(WIDTH, width=16)
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, image: Tensor) -> Tensor:
        """Return [B, outputs] of drawings [B, 3, 32, 32]."""
        return self.head(torch.relu(self.encoder(image)))


def labelled(model: Classifier, batch: Batch) -> Batch:
    """The task of the probe: return the features below the head."""
    return {"features": model.encoder(batch["image"]), "labels": batch["label"]}


def main(loss_name: str, emoji: Sequence[Emoji], epochs: int = EPOCHS) -> dict[str, float]:
    """Train; return the accuracies on unseen emoji, and that of a constant prediction."""
    torch.manual_seed(0)
    names = labels.category_names(emoji)
    loss = LOSSES[loss_name]()
    model = Classifier(outputs=len(names) if loss_name == "cross_entropy" else 128)
    loader = SeededLoader(
        labels.LabelledDrawings(emoji), BATCH_SIZE, seed=0, collate=labels.collate_labelled
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.05, lr=2e-3))
    trainer = Trainer(model, loss, optimizer, task=tasks.classification, seed=0)
    average = WeightAverage(decay=0.99)
    run_dir = new_run("runs", f"classification_{loss_name}")
    bank = labels.labelled_batches(emoji, training_drawings(emoji))
    unseen = labels.labelled_batches(emoji, labels.unseen_emoji_drawings(emoji))
    trainer.attach(LearningRate(warmup=len(loader)), average, *default_handlers(run_dir))
    if loss_name == "cross_entropy":  # Ignite's metric as it is: of logits and labels
        trainer.attach(Evaluation(unseen, metrics=[Accuracy()]))

    probe = Evaluator(model, task=labelled, metrics={"kNN": KNNAccuracy(bank, k=20)})
    results = {"constant": labels.largest_share(unseen)}
    results["untrained, kNN"] = probe.evaluate(unseen)["kNN"]
    trainer.run(loader, max_epochs=epochs)
    with average.averaged():
        results["trained, kNN"] = probe.evaluate(unseen)["kNN"]
    if loss_name == "cross_entropy":
        results["trained, logits"] = trainer.state.metrics["val/accuracy"]
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", choices=LOSSES, default="cross_entropy")
    for name, accuracy in main(parser.parse_args().loss, read_emoji()).items():
        print(f"{name:15} {accuracy:6.1%}")
