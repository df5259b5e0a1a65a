"""The cost of copying batches to a GPU, and how much of it prefetching hides.

    python -m benchmarks.prefetch

Two models train with CLIP's loss, AdamW and bf16: a ViT-S/16 with a text tower of six layers, and a
small model whose update is short compared with the copy of its batch. First table: batches of
float32 images are in host memory, pinned or pageable; a raw loop and a trainer with and without
prefetching train on them. `resident` is the raw loop on a batch that is already on the device, the
upper bound. Second table: a DataLoader reads bytes, which the trainer scales on the device; `data`
is `time/data`, the time that the device waited for data. The loops of a table run in turn; each row
is the best of its turns.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from ignite.engine import Events
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.train_step import LENGTH, WORDS, ImageText
from diptych.engine import OnKeys, Trainer, tasks
from diptych.handlers import Throughput
from diptych.losses import CLIPLoss

PIXELS = 224
MODELS = {
    "ViT-S/16": {"width": 384, "image_layers": 12, "text_layers": 6, "pixels": PIXELS},
    "small": {"width": 192, "image_layers": 2, "text_layers": 2, "pixels": PIXELS},
}
WARMUP = 5
Batches = Iterable[dict[str, Tensor]]
Contender = Callable[[Batches], float]
"""Trains on some batches; returns the seconds of the updates after the warm-up."""


def parts(model: str) -> tuple[ImageText, CLIPLoss, torch.optim.Optimizer]:
    """Return a model, a loss and an optimizer, the same each time."""
    torch.manual_seed(0)
    built, loss = ImageText(**MODELS[model]).cuda(), CLIPLoss().cuda()
    weights = [*built.parameters(), *loss.parameters()]
    return built, loss, torch.optim.AdamW(weights, lr=1e-4, fused=True)


def host_batches(samples: int, *, pinned: bool) -> list[dict[str, Tensor]]:
    """Return a few batches in host memory."""
    batches = [
        {
            "image": torch.rand(samples, 3, PIXELS, PIXELS),
            "text": torch.randint(WORDS, (samples, LENGTH)),
        }
        for _ in range(3)
    ]
    if not pinned:
        return batches
    return [{key: value.pin_memory() for key, value in batch.items()} for batch in batches]


def repeated(batches: list[dict[str, Tensor]], count: int) -> Iterator[dict[str, Tensor]]:
    """Yield `count` batches."""
    for index in range(count):
        yield batches[index % len(batches)]


def raw(model: str) -> Contender:
    """Return a plain training loop."""
    built, loss, optimizer = parts(model)

    def run(batches: Batches) -> float:
        start = 0.0
        for index, batch in enumerate(batches):
            if index == WARMUP:
                torch.cuda.synchronize()
                start = time.perf_counter()
            there = {key: value.to("cuda", non_blocking=True) for key, value in batch.items()}
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                value = loss(*built(there["image"], there["text"]))
            value.backward()
            optimizer.step()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def made(model: str, *, prefetch: bool, **settings: Any) -> Trainer:
    """Return a trainer without a log point inside a run."""
    built, loss, optimizer = parts(model)
    settings = {"precision": "bf16", "prefetch": prefetch, "log_every": 10**9, **settings}
    return Trainer(built, loss, optimizer, task=tasks.image_text, **settings)


def timed(trainer: Trainer, batches: Batches, steps: int) -> float:
    """Return the seconds of a run's iterations after its warm-up."""
    times: list[float] = []

    def stamp() -> None:
        torch.cuda.synchronize()
        times.append(time.perf_counter())

    handles = [
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=at), stamp)
        for at in (WARMUP, WARMUP + steps)
    ]
    trainer.state.max_epochs = trainer.state.max_iters = None
    trainer.run(batches, epoch_length=WARMUP + steps)
    for handle in handles:
        handle.remove()
    return times[1] - times[0]


def diptych(model: str, steps: int, *, prefetch: bool) -> Contender:
    """Return a trainer that measures how long it waits for data."""
    trainer = made(model, prefetch=prefetch).attach(Throughput())
    return lambda batches: timed(trainer, batches, steps)


def copies(model: str, samples: int, steps: int, turns: int) -> None:
    """Print the rows of the first table for one model."""
    pinned = host_batches(samples, pinned=True)
    kinds = {"pinned": pinned, "pageable": host_batches(samples, pinned=False)}
    resident = [{key: value.cuda() for key, value in pinned[0].items()}]
    contenders: dict[str, Contender] = {
        "raw": raw(model),
        "Diptych, prefetch=False": diptych(model, steps, prefetch=False),
        "Diptych": diptych(model, steps, prefetch=True),
    }
    rows = {("resident", "raw"): (contenders["raw"], resident)}
    rows |= {
        (kind, name): (run, batches)
        for kind, batches in kinds.items()
        for name, run in contenders.items()
    }
    best = dict.fromkeys(rows, float("inf"))
    for _ in range(turns):
        for row, (run, batches) in rows.items():
            best[row] = min(best[row], run(list(repeated(batches, WARMUP + steps))) / steps)
    bound = best["resident", "raw"]
    for (kind, name), seconds in best.items():
        rates = f"{seconds * 1e3:.1f} | {samples / seconds:,.0f} | {bound / seconds:.3f}"
        print(f"| {model} | {kind} | {name} | {rates} |", flush=True)


class Bytes(Dataset[dict[str, Tensor]]):
    """A data set in memory: images as bytes, and texts.

    Args:
        samples: the length of the data set.
    """

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (64, 3, PIXELS, PIXELS)
        self._images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        self._texts = torch.randint(WORDS, (64, LENGTH), generator=generator)
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self._images[index % 64], "text": self._texts[index % 64]}


def scaled(images: Tensor) -> Tensor:
    """Return bytes as numbers from 0 to 1."""
    return images.float() / 255


def loaders(model: str, samples: int, steps: int, workers: Iterable[int]) -> None:
    """Print the rows of the second table for one model."""
    data = Bytes((WARMUP + steps) * samples)
    for count in workers:
        for prefetch in (False, True):
            gc.collect()  # a forked worker crashes if it collects an old trainer's CUDA tensors
            trainer = made(model, prefetch=prefetch, transform=OnKeys(scaled, "image"))
            waits: list[float] = []
            trainer.attach(Throughput())
            trainer.add_event_handler(  # do not count the start of the workers as waiting
                Events.ITERATION_COMPLETED(once=WARMUP), lambda e: e.metrics.log(WARMUP)
            )
            trainer.add_event_handler(
                Events.EPOCH_COMPLETED,
                lambda e, kept=waits: kept.append(e.metrics.record.values["time/data"]),
            )
            loader = DataLoader(data, samples, num_workers=count, pin_memory=True)
            seconds = timed(trainer, loader, steps) / steps
            row = f"{seconds * 1e3:.1f} | {samples / seconds:,.0f} | {waits[0] * 1e3:.1f}"
            print(f"| {model} | {count} | {'on' if prefetch else 'off'} | {row} |", flush=True)


def main() -> int:
    """Measure, and print the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--samples", type=int, default=256, help="samples per batch")
    parser.add_argument("--steps", type=int, default=25, help="measured updates per turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument(
        "--workers", nargs="*", type=int, default=[0, 8], help="workers of the DataLoader"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("This benchmark needs a CUDA device: only there are batches prefetched.\n")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| model | batches | loop | ms per step | samples/s | relative to resident |")
    print("|---|---|---|---:|---:|---:|")
    measure = partial(copies, samples=arguments.samples, steps=arguments.steps)
    for model in arguments.models:
        measure(model, turns=arguments.turns)
    if arguments.workers:
        print("\n| model | workers | prefetch | ms per step | samples/s | data, ms |")
        print("|---|---:|---|---:|---:|---:|")
    for model in arguments.models:
        loaders(model, arguments.samples, arguments.steps, arguments.workers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
