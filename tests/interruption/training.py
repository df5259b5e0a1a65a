"""A training script, to be killed, with everything that an interruption could change.

Usage: python -m tests.interruption.training FOLDER RENDEZVOUS [SECONDS]

With SECONDS each iteration takes at least that long, so that a signal arrives in the middle.
Environment: RANK, WORLD_SIZE, MICROBATCH_SIZE; SHARD shards the model; EQUAL makes the weights
independent of the number of ranks; GPU trains on a GPU for each rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from ignite.engine import Events
from ignite.handlers import EMAHandler
from torch import Tensor, nn
from torch.utils.data import Dataset

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.engine.distributed.dtensor import full_tensor
from diptych.handlers import (
    CheckpointManager,
    EarlyStopping,
    Evaluation,
    GradientClipping,
    JsonLines,
    LearningRate,
    RetrievalRecall,
    WeightAverage,
)
from diptych.losses import MoCoLoss

EPOCHS, SAMPLES, BATCH = 4, 44, 8


class Pairs(Dataset):
    """Two noisy views of each sample; the noise is drawn when it is read."""

    def __init__(self) -> None:
        self.base = torch.randn(SAMPLES, 12, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first, second = self.base[index] + 0.3 * torch.randn(2, 12)
        return {"first": first, "second": second, "group": torch.tensor(index)}


class Encoder(nn.Module):
    """An encoder with batch norm and dropout: changing buffers, and random draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class EqualEncoder(nn.Module):
    """An encoder that is the same on any number of ranks: no batch norm, no dropout, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 8)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.double())


def jitter(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add noise to a whole batch, on the device."""
    return {**batch, "first": batch["first"] + 0.1 * torch.randn_like(batch["first"])}


def as_pairs(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the features of two views as the metric expects."""
    return {
        "image_features": outputs["first_features"],
        "text_features": outputs["second_features"],
    }


class Order:
    """Records the samples of every update on all ranks, as part of the run's state."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def attach(self, trainer: Trainer) -> None:
        """Record each batch after its update."""
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.note)

    def note(self, trainer: Trainer) -> None:
        """Record the samples of one update."""
        own = trainer.state.batch["group"].tolist()
        shares = [own]
        if dist.is_initialized():
            shares = [[]] * dist.get_world_size()
            dist.all_gather_object(shares, own)
        self.seen.append([index for share in shares for index in share])

    def state_dict(self) -> dict[str, list[list[int]]]:
        """Return the samples so far."""
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, list[list[int]]]) -> None:
        """Continue from saved samples."""
        self.seen = state_dict["seen"]


def build(folder: Path) -> tuple[Trainer, SeededLoader, Average, Order]:
    """Return the trainer with its handlers, its loader, the average, and the order of samples."""
    torch.manual_seed(0)
    equal = "EQUAL" in os.environ
    model, loss = EqualEncoder() if equal else Encoder(), MoCoLoss(dim=8, queue_size=20)
    loss = loss.double() if equal else loss
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=0.01)
    trainer = Trainer(
        model,
        loss,
        optimizer,
        task=tasks.two_views,
        transform=None if equal else jitter,
        device=f"cuda:{os.environ.get('RANK', '0')}" if "GPU" in os.environ else "cpu",
        seed=2,
        log_every=3,
        microbatch_size=int(os.environ.get("MICROBATCH_SIZE", "3")),
        shard=("layers.0", "layers.3" if equal else "layers.4") if "SHARD" in os.environ else False,
    )
    average, of_average = averaged(trainer)
    evaluated = SeededLoader(Pairs(), BATCH, seed=9, shuffle=False)
    metrics = [RetrievalRecall(k=(1, 5), output_transform=as_pairs) for _ in range(2)]
    order = Order()
    trainer.attach(
        LearningRate(warmup=5, decay="cosine"),
        GradientClipping(max_norm=1.0),
        Evaluation(evaluated, metrics=metrics[:1]),
        Evaluation(evaluated, metrics=metrics[1:], prefix="average", model=of_average),
        EarlyStopping(metric="val/recall@1", patience=50),
        JsonLines(folder),
        order,
        CheckpointManager(folder / "checkpoints", every=2, best="val/recall@1", background=True),
    )
    loader = SeededLoader(Pairs(), BATCH, seed=3, num_workers=2)
    return trainer, loader, average, order


Average = Callable[[], dict[str, Tensor]]


def averaged(trainer: Trainer) -> tuple[Average, nn.Module | None]:
    """Average the weights; return a function that returns the average, and Ignite's model of it."""
    if "SHARD" in os.environ:  # such a model cannot be copied
        own = WeightAverage(decay=0.95)
        trainer.attach(own)
        return own.average_state_dict, None
    average = EMAHandler(trainer.model, momentum=0.05)
    average.attach(trainer)
    return average.ema_model.state_dict, average.ema_model


def join(rendezvous: str) -> None:
    """Join the group of the ranks, if there are several, with the rank's GPU if it has one."""
    if "GPU" in os.environ:
        torch.cuda.set_device(int(os.environ.get("RANK", "0")))
    if "RANK" in os.environ:
        dist.init_process_group(
            "nccl" if "GPU" in os.environ else "gloo",
            init_method=f"file://{rendezvous}",
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )


def main() -> None:
    """Train to the end from the latest checkpoint, and write the digest of the result."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    join(sys.argv[2])
    trainer, loader, average, order = build(folder)
    if len(sys.argv) > 3:
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda: time.sleep(float(sys.argv[3])))
    trainer.run(loader, max_epochs=EPOCHS)
    states = [trainer.model.state_dict(), trainer.loss.state_dict(), average()]
    values = [full_tensor(value).cpu() for state in states for value in state.values()]
    content = b"".join(value.numpy().tobytes() for value in values)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "order.json").write_text(json.dumps(order.seen))
        torch.save(values, folder / "weights.pt")
        (folder / "digest").write_text(hashlib.sha256(content).hexdigest())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
