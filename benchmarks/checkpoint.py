"""The pause of a training while it saves a model of 100 M parameters with AdamW's state.

Usage: python benchmarks/checkpoint.py [--millions 100] [--saves 3] [--directory DIR]

Each method saves model and optimizer (three numbers per parameter, float32) to the same folder, in
turn. The pause is the time between the end of one step and the start of the next, without the step
itself. Besides writing, torch.save does nothing; Ignite's Checkpoint with DiskSaver renames;
Diptych flushes the file to disk, reads it back, renames it and keeps a manifest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ignite.handlers import Checkpoint, DiskSaver
from torch import Tensor, nn

from diptych.engine import RunEvents, Trainer
from diptych.handlers import CheckpointManager


class Wide(nn.Module):
    """A model with a given number of million parameters, in layers of one million each."""

    def __init__(self, millions: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1000, 1000, bias=False) for _ in range(millions))

    def forward(self, x: Tensor) -> Tensor:
        """Return the last layer's output."""
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def make_trainer(millions: int, folder: Path) -> Trainer:
    """Return a trainer whose optimizer has state; its step waits until no file is being written."""
    model = Wide(millions)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def step(_: Trainer, __: object) -> None:
        time.sleep(0.2)
        while list(folder.glob("*/*.unfinished")):
            time.sleep(0.05)

    return Trainer(
        model,
        nn.MSELoss(),
        optimizer,
        task=lambda model, batch: {"output": model(batch), "target": batch},
        step=step,
    )


def pauses(save: Callable[[], object], saves: int) -> list[float]:
    """Return the seconds of each call."""
    seconds = []
    for _ in range(saves):
        start = time.perf_counter()
        save()
        seconds.append(time.perf_counter() - start)
    return seconds


def pauses_in_a_run(millions: int, folder: Path, saves: int, *, background: bool) -> list[float]:
    """Return the seconds of each safe point at which the checkpoint manager saves."""
    trainer = make_trainer(millions, folder)
    marks: list[float] = []
    trainer.add_event_handler(RunEvents.SAFE_POINT, lambda: marks.append(time.perf_counter()))
    directory = folder / ("background" if background else "waiting")
    trainer.attach(CheckpointManager(directory, every=1, keep=1, background=background))
    trainer.add_event_handler(RunEvents.SAFE_POINT, lambda: marks.append(time.perf_counter()))
    trainer.run(None, max_epochs=saves, epoch_length=1)
    return [after - before for before, after in zip(marks[::2], marks[1::2], strict=True)]


def measure(millions: int, folder: Path, saves: int) -> dict[str, float]:
    """Return the median pause of each method, in seconds."""
    trainer = make_trainer(millions, folder)
    parts = {"model": trainer.model, "optimizer": trainer.optimizer}
    checkpoint = Checkpoint(parts, DiskSaver(folder / "ignite", require_empty=False), n_saved=1)

    def plain() -> None:
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "plain.pt")

    def ignite() -> None:
        trainer.state.iteration += 1
        checkpoint(trainer)

    ways = {
        "torch.save": pauses(plain, saves),
        "Ignite Checkpoint": pauses(ignite, saves),
        "Diptych": pauses_in_a_run(millions, folder, saves, background=False),
        "Diptych, background": pauses_in_a_run(millions, folder, saves, background=True),
    }
    return {name: statistics.median(seconds) for name, seconds in ways.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--millions", type=int, default=100, help="parameters, in millions")
    parser.add_argument("--saves", type=int, default=3, help="saves per method; the median counts")
    parser.add_argument(
        "--directory", type=Path, help="where to write; default: a temporary folder"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        medians = measure(arguments.millions, Path(folder), arguments.saves)
    reference = medians["torch.save"]
    sys.stdout.write(
        f"{arguments.millions} M parameters, AdamW, float32, median of {arguments.saves}\n"
    )
    sys.stdout.write(f"{'method':<22}{'pause':>10}{'relative to torch.save':>25}\n")
    for name, seconds in medians.items():
        sys.stdout.write(f"{name:<22}{seconds:>9.2f}s{seconds / reference:>25.2f}\n")


if __name__ == "__main__":
    main()
