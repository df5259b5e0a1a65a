"""The gain from several accelerators of one host, beside torch's DistributedDataParallel.

    torchrun --nproc-per-node=2 benchmarks/train_step_ranks.py
    torchrun --nproc-per-node=4 benchmarks/train_step_ranks.py --large 32768
    torchrun --nproc-per-node=4 benchmarks/train_step_ranks.py --samples --sharded 40
    torchrun --nproc-per-node=2 benchmarks/train_step_ranks.py --samples 8 --steps 3  # on a CPU

The model, loss and optimizer are those of `train_step.py`, in a trainer with the default handlers.
First rank 0 trains alone while the others wait; then all ranks train together, each with the same
number of samples: in the trainer, and in a plain loop with torch's wrapper and the usual form of
the loss (`peer_loss.py`). The script also compares losses on one global batch: rank 0 alone trains
on all of it, then the ranks train on their shares. The losses of a few updates must be equal up to
rounding.

With `--large`, a global batch in micro-batches and tiles; with `--sharded`, a model that the ranks
share (`sharded_step.py`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diptych.engine import Trainer, of_this_rank, process_group, tasks
from diptych.engine.distributed.collectives import all_reduce_sum, rank, world_size

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find `benchmarks` when run as a file
from benchmarks import sharded_step
from benchmarks.peer_loss import peer_loss
from benchmarks.train_step import CUDA, Contender, autocast, diptych, looped, parts, resident

UPDATES = 10
"""The number of updates whose losses are compared."""
COMPARED = 64
"""The most samples of a rank in them: rank 0 computes all of them in one piece, in float32."""
PIECE = 1024 if CUDA else 8
"""Samples of a micro-batch of the large batch."""


@contextmanager
def alone() -> Iterator[None]:
    """Hide the process group from this rank, so that it trains alone."""
    is_initialized, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        yield
    finally:
        dist.is_initialized = is_initialized


class Scaled(nn.Module):
    """Two towers with a learned scale, as torch's wrapper needs them: in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.towers, loss, _ = parts()
        self.log_scale = nn.Parameter(-torch.tensor(loss.temperature.value).log())

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features of both, and the logarithm of the scale."""
        return *self.towers(image, text), self.log_scale


def wrapped(*, compiled: bool) -> Contender:
    """Return a plain loop with torch's wrapper and the usual form of the loss."""
    model = Scaled().cuda() if CUDA else Scaled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=CUDA)
    if compiled:
        model.towers.compile()
    parallel = DistributedDataParallel(model, [torch.cuda.current_device()] if CUDA else None)

    def step(batch: dict[str, Tensor]) -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            value = peer_loss(*parallel(batch["image"], batch["text"]))
        value.backward()
        optimizer.step()

    return looped(step)


def medians(loops: dict[str, Contender], samples: int, steps: int) -> dict[str, float]:
    """Return the seconds per update of each loop: the median of three turns, in turn."""
    batch = resident(samples)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(3):
        for name, run in loops.items():
            times[name].append(run(batch, 2 if turn else 5, steps) / steps)
    return {name: statistics.median(values) for name, values in times.items()}


def print_row(samples: int, name: str, rate: float, one: float, beside: str = "") -> None:
    """Print a row of the table, on rank 0."""
    if rank() == 0:
        print(f"| {samples:,} | {name} | {rate:,.0f} | {rate / one:.2f} | {beside} |", flush=True)


def losses(batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """Return the mean over ranks of the loss of each update, in float32."""
    model, loss, optimizer = parts()
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text)
    found: list[torch.Tensor] = []
    trainer.add_event_handler("ITERATION_COMPLETED", lambda t: found.append(t.state.output.loss))
    trainer.run(batches, max_epochs=1)
    return (all_reduce_sum(torch.stack(found).double()) / world_size()).tolist()


def global_batches(samples: int) -> list[dict[str, torch.Tensor]]:
    """Return global batches, the same on every rank, with `samples` samples per rank."""
    torch.manual_seed(1)
    batch = resident(samples * world_size())
    return [{**batch, "image": batch["image"].float()}] * UPDATES


def measure(samples: int, steps: int, *, compiled: bool) -> float:
    """Print the samples/s of one rank and of all ranks; return the trainer's on one rank."""
    form = "compiled" if compiled else "eager"
    single = torch.zeros(1, dtype=torch.float64, device="cuda" if CUDA else "cpu")
    if rank() == 0:
        with alone():
            (seconds,) = medians({"": diptych(compiled=compiled)}, samples, steps).values()
        single += seconds
    dist.broadcast(single, src=0)
    one = samples / single.item()
    print_row(samples, f"{form} | diptych, one rank", one, one)
    loops = {"diptych": diptych(compiled=compiled), "wrapper": wrapped(compiled=compiled)}
    rates = {
        name: samples * world_size() / seconds
        for name, seconds in medians(loops, samples, steps).items()
    }
    beside = f"{rates['diptych'] / rates['wrapper']:.3f}"
    print_row(samples, f"{form} | diptych", rates["diptych"], one, beside)
    print_row(samples, f"{form} | DistributedDataParallel", rates["wrapper"], one)
    return one


def compare_losses(samples: int) -> None:
    """Print the largest difference between the losses of one rank and of all ranks."""
    batches, expected = global_batches(samples), None
    if rank() == 0:
        with alone():
            expected = losses(batches)
    dist.barrier()
    found = losses(list(of_this_rank(batches)))
    if expected is not None:
        difference = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        print(
            f"\n{UPDATES} updates with {samples * world_size()} samples: the losses of one rank "
            f"and of {world_size()} differ by {difference:.1e}",
            flush=True,
        )


def large_batch(samples: int, one: float) -> None:
    """Print the samples/s of a global batch in micro-batches, with the loss in tiles.

    Args:
        samples: of the global batch.
        one: samples/s of one rank without micro-batches; 0 if it was not measured.
    """
    own = samples // world_size()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = diptych(compiled=False, microbatch_size=PIECE)(resident(own), 1, 2) / 2
    memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0
    if rank() == 0:
        rate = samples / seconds
        beside = f"{rate / one / world_size():.2f} of what {world_size()} single ranks do without "
        print(
            f"\nbatch {samples:,} in pieces of {PIECE:,}: {rate:,.0f} samples/s, "
            f"{beside + 'pieces, ' if one else ''}at most {memory:.1f} GB a rank",
            flush=True,
        )


def parsed() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", nargs="*", type=int, default=[64, 1024] if CUDA else [8])
    parser.add_argument("--steps", type=int, default=10, help="measured updates per turn")
    parser.add_argument("--compile", action="store_true", help="also measure the compiled form")
    parser.add_argument("--large", type=int, default=0, help="samples of a global batch; 0: none")
    parser.add_argument("--sharded", type=int, default=0, help="updates of the sharded model")
    parser.add_argument(
        "--sharded-samples", type=int, default=16 if CUDA else 2, help="samples of each rank"
    )
    if world_size() == 1:
        parser.error("several ranks are needed: torchrun --nproc-per-node=2 " + sys.argv[0])
    return parser.parse_args()


def main() -> None:
    """Measure, and print the tables."""
    arguments = parsed()
    if rank() == 0:
        name = torch.cuda.get_device_name() if CUDA else "CPU"
        print(f"{world_size()} x {name}, torch {torch.__version__}\n")
        print("| batch per rank | form | loop | samples/s | to one rank | to the wrapper |")
        print("|---:|---|---|---:|---:|---:|", flush=True)
    one = 0.0
    for compiled in [True, False] if arguments.compile else [False]:
        for samples in arguments.samples:
            one = measure(samples, arguments.steps, compiled=compiled)
    if arguments.samples:
        compare_losses(min(COMPARED, *arguments.samples))
    if arguments.large:
        large_batch(arguments.large, one)
    if arguments.sharded:
        sharded_step.compare(arguments.sharded_samples, arguments.sharded)


if __name__ == "__main__":
    with process_group():
        main()
