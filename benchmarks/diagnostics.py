"""The cost of the handlers that read gradients, on the emoji model.

Usage: OMP_NUM_THREADS=1 python -m benchmarks.diagnostics [--rounds 8]

There is one trainer per row, all built alike. In each round every trainer makes 10 updates with the
same 10 batches, one trainer after the other, in an order that rotates between rounds. A round has
one measurement of `GradientDiagnostics(every=10)`. There are two figures, both of process CPU time:
the time of the handlers themselves, measured between the first and the last function of each event,
as a share of the rest; and the whole round relative to the bare trainer, the median over rounds,
which includes the other load of the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine import SeededLoader, StepEvents, Trainer, tasks
from diptych.handlers import (
    GradientClipping,
    GradientDiagnostics,
    LossGuard,
    ModalityBalancing,
)
from diptych.losses import CLIPLoss
from examples.emoji.data import TrainingPairs, collate, read_emoji
from examples.emoji.model import TwoTowers

UPDATES = 10
TOWERS = {"image": "encode_image", "text": "encode_text"}

ROWS: dict[str, Callable[[Path], list[Any]]] = {
    "bare": lambda _: [],
    "GradientDiagnostics(every=10)": lambda _: [GradientDiagnostics(every=10)],
    "GradientClipping(max_norm=1.0)": lambda _: [GradientClipping(max_norm=1.0)],
    "ModalityBalancing": lambda _: [ModalityBalancing(components=TOWERS, warmup=0)],
    "LossGuard()": lambda _: [LossGuard()],
    "LossGuard(directory)": lambda folder: [LossGuard(folder)],
}


def make_trainer() -> Trainer:
    """Return a trainer of the emoji example's model."""
    torch.manual_seed(0)
    model, loss = TwoTowers(), CLIPLoss()
    optimizer = torch.optim.Adam(
        [*model.parameters(), *loss.parameters()], lr=2e-3, betas=(0.9, 0.98), fused=True
    )
    return Trainer(model, loss, optimizer, task=tasks.image_text, device="cpu", seed=0)


def first_batches() -> list[dict[str, Tensor]]:
    """Return the first batches of the emoji example, read and augmented in advance."""
    pairs = TrainingPairs(read_emoji())
    loader = SeededLoader(pairs, 256, seed=0, drop_last=True, collate=collate)
    return [batch for _, batch in zip(range(UPDATES), loader, strict=False)]


class Stopwatch:
    """Attaches handlers to a trainer, and measures the CPU time that they take."""

    EVENTS = (Events.ITERATION_STARTED, StepEvents.GRADIENTS_READY, StepEvents.OPTIMIZER_STEPPED)

    def __init__(self, trainer: Trainer, handlers: list[Any]) -> None:
        self.seconds = 0.0
        for event in self.EVENTS:
            trainer.add_event_handler(event, self._start)
        trainer.attach(*handlers)
        for event in self.EVENTS:
            trainer.add_event_handler(event, self._stop)

    def _start(self) -> None:
        self.seconds -= time.process_time()

    def _stop(self) -> None:
        self.seconds += time.process_time()


def measure(rounds: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Return for each row, per round, its CPU seconds and those of its handlers only."""
    batches = first_batches()
    trainers = {name: make_trainer() for name in ROWS}
    watches = {name: Stopwatch(trainers[name], ROWS[name](folder / name)) for name in ROWS}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
    for number in range(-1, rounds):  # the first round is a warm-up
        names = list(ROWS)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            watches[name].seconds = 0.0
            start = time.process_time()
            trainers[name].run(batches, max_epochs=number + 2)
            if number >= 0:
                found[name].append((time.process_time() - start, watches[name].seconds))
    return found


def table(found: dict[str, list[tuple[float, float]]]) -> str:
    """Return the costs as a Markdown table."""
    bare = [whole for whole, _ in found["bare"]]
    lines = [
        "| attached | ms per update | handlers only, ms | share | total, relative to bare |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, pairs in found.items():
        whole = statistics.median(whole for whole, _ in pairs) / UPDATES
        own = statistics.median(own for _, own in pairs) / UPDATES
        ratio = statistics.median(a / b for (a, _), b in zip(pairs, bare, strict=True))
        share, cost = f"{100 * own / (whole - own):.2f} %", f"{100 * (ratio - 1):+.1f} %"
        columns = f"{1000 * whole:.0f} | {1000 * own:.2f} | {share} | {cost}"
        lines.append(f"| {name} | {columns} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8, help="rounds, of 10 updates per row")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(table(measure(arguments.rounds, Path(folder))))


if __name__ == "__main__":
    main()
