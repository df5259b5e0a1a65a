"""The cost of remembering the state before each step, as a share of host-limited updates.

    OMP_NUM_THREADS=1 python -m benchmarks.snapshot

After an exception, the next `run` repeats the step exactly; for this the trainer copies random
generators, buffers and the versions of the weights before each step. The script measures those
copies alone, and a whole update of a small batch, whose time is the host's: the kernels are short.
Without a GPU, the models are small.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diptych.engine import Trainer, tasks
from diptych.engine.step.step_snapshot import StepSnapshot

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
REPEATS = 7


class Block(nn.Module):
    """A residual block of two convolutions with batch norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        inner = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(inner)))


class QueueLoss(nn.Module):
    """Cross entropy with a queue of keys, which each call overwrites in part."""

    def __init__(self, rows: int, width: int = 512) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(rows, width))
        self.project = nn.Linear(10, width)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        keys = self.project(logits)
        logits_of_queue = keys @ self.queue.clone().T
        with torch.no_grad():
            self.queue[: len(keys)] = keys
        own = nn.functional.cross_entropy(logits, labels)
        return own + logits_of_queue.logsumexp(1).mean()


def convolutions(blocks: int) -> nn.Module:
    """Return a network of residual blocks with two batch norms each."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(nn.Conv2d(3, 16, 3), *(Block(16) for _ in range(blocks)), head)


def transformer(layers: int) -> nn.Module:
    """Return a transformer over rows of pixels, with dropout."""
    layer = nn.TransformerEncoderLayer(24, 4, 48, 0.1, batch_first=True)
    return nn.Sequential(
        nn.Flatten(2),
        nn.Linear(64, 24),
        nn.TransformerEncoder(layer, layers),
        nn.Flatten(),
        nn.Linear(72, 10),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "transformer, 4 layers": (lambda: transformer(4), nn.CrossEntropyLoss),
    "transformer, 12 layers": (lambda: transformer(12), nn.CrossEntropyLoss),
    "8 batch norms": (lambda: convolutions(4), nn.CrossEntropyLoss),
    "50 batch norms": (lambda: convolutions(25), nn.CrossEntropyLoss),
    "8 batch norms, queue of 65,536 x 512": (lambda: convolutions(4), lambda: QueueLoss(65_536)),
}
"""Name to the model and the loss."""


def trainer_of(name: str) -> Trainer:
    """Return a trainer of a case."""
    torch.manual_seed(0)
    model, loss = (part().to(DEVICE) for part in CASES[name])
    weights = [*model.parameters(), *loss.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=CUDA or None)
    return Trainer(model, loss, optimizer, task=tasks.classification, log_every=10**9)


def best(function: Callable[[], object], calls: int) -> float:
    """Return the microseconds of a call on the host, the minimum of several rounds."""
    times = []
    for _ in range(REPEATS):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
        if CUDA:
            torch.cuda.synchronize()
    return min(times)


def measured(name: str, calls: int) -> tuple[float, float]:
    """Return the microseconds of an update without a snapshot, and of the snapshot."""
    trainer = trainer_of(name)
    batch: dict[str, Any] = {
        "image": torch.randn(4, 3, 8, 8, device=DEVICE),
        "label": torch.arange(4, device=DEVICE),
    }
    trainer.run([batch] * 3, max_epochs=1)
    snapshot = StepSnapshot(trainer)
    for _ in range(3):
        snapshot.take()
        trainer.make_update(batch)

    def changed() -> None:
        with torch.no_grad():
            for buffer in trainer.loss.buffers():
                buffer[:1] = 0.0  # as the step does: a queue is copied because it has changed
        snapshot.take()

    def unchanged() -> None:
        with torch.no_grad():
            for buffer in trainer.loss.buffers():
                buffer[:1] = 0.0

    update = best(lambda: trainer.make_update(batch), calls)
    return update, best(changed, calls) - best(unchanged, calls)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=50, help="calls in a round")
    parser.add_argument("--only", nargs="+", choices=CASES, help="measure only these")
    options = parser.parse_args()
    print("| model | update, us | snapshot, us | share |\n|---|---:|---:|---:|")
    for name in options.only or CASES:
        update, snapshot = measured(name, options.calls)
        print(f"| {name} | {update:,.0f} | {snapshot:.1f} | {snapshot / update:.2%} |")


if __name__ == "__main__":
    main()
