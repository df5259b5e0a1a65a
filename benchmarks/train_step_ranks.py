"""The gain from several accelerators of one host: samples/s at the same batch size per rank.

    torchrun --nproc-per-node=2 benchmarks/train_step_ranks.py
    torchrun --nproc-per-node=2 benchmarks/train_step_ranks.py --samples 8 --steps 3  # on a CPU

The model, loss and optimizer are those of `train_step.py`, in a trainer with the default handlers.
First rank 0 trains alone while the others wait; then all ranks train together, each with the same
number of samples. The script also compares losses on one global batch: rank 0 alone trains on all
of it, then the ranks train on their shares. The losses of a few updates must be equal up to
rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from diptych.engine import Trainer, of_this_rank, process_group, tasks
from diptych.engine.distributed.collectives import all_reduce_sum, rank, world_size

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find `benchmarks` when run as a file
from benchmarks.train_step import CUDA, diptych, parts, resident

UPDATES = 10
"""The number of updates whose losses are compared."""


@contextmanager
def alone() -> Iterator[None]:
    """Hide the process group from this rank, so that it trains alone."""
    is_initialized, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        yield
    finally:
        dist.is_initialized = is_initialized


def rate(samples: int, steps: int, *, compiled: bool) -> float:
    """Return the seconds per update in this process, the minimum of three turns."""
    run, batch = diptych(compiled=compiled), resident(samples)
    return min(run(batch, 10 if turn == 0 else 3, steps) for turn in range(3)) / steps


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


def measure(samples: int, steps: int, *, compiled: bool) -> None:
    """Print the samples/s of one rank and of all ranks, and the largest difference in loss."""
    single = expected = None
    if rank() == 0:
        with alone():
            single = rate(samples, steps, compiled=compiled)
    dist.barrier()
    together = rate(samples, steps, compiled=compiled)
    batches = global_batches(samples)
    if rank() == 0:
        with alone():
            expected = losses(batches)
    dist.barrier()
    found = losses(list(of_this_rank(batches)))
    if single is not None and expected is not None:
        one, all_ranks = samples / single, samples * world_size() / together
        difference = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        form = "compiled" if compiled else "eager"
        print(
            f"| {samples:,} | {form} | {one:,.0f} | {all_ranks:,.0f} | {all_ranks / one:.2f} "
            f"| {difference:.1e} |"
        )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", nargs="+", type=int, default=[256, 1024] if CUDA else [32])
    parser.add_argument("--steps", type=int, default=50, help="measured updates per turn")
    parser.add_argument("--compile", action="store_true", help="also measure the compiled form")
    arguments = parser.parse_args()
    if world_size() == 1:
        parser.error("several ranks are needed: torchrun --nproc-per-node=2 " + sys.argv[0])
    if rank() == 0:
        name = torch.cuda.get_device_name() if CUDA else "CPU"
        print(f"{world_size()} x {name}, torch {torch.__version__}\n")
        print("| batch per rank | form | 1 rank, samples/s | all | ratio | losses differ by |")
        print("|---:|---|---:|---:|---:|---:|")
    for compiled in [False, True] if arguments.compile else [False]:
        for samples in arguments.samples:
            measure(samples, arguments.steps, compiled=compiled)


if __name__ == "__main__":
    with process_group():
        main()
