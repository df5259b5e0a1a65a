"""Time and memory of a loss on one global batch, by the number of ranks, beside the usual form.

    python benchmarks/loss_ranks.py
    python benchmarks/loss_ranks.py --loss simclr --ranks 1 2 4 --sizes 16384 65536

Each row is one forward and backward pass on given features of the global batch, [B, 512], of which
each rank has an equal part (whose sizes are announced before, as a trainer does): bfloat16 on GPUs
(NCCL), float32 on a CPU (gloo, one thread a rank).
*Usual* is the form of most training code: gather with gradient, the rank's logits [b, B], and a
cross entropy for each direction. Time is that of the slowest rank, the minimum of a few rounds;
memory is the largest peak of a rank beyond its features. On a CPU, where ranks share the cores, the
time is the CPU seconds of all ranks together. *Share* is the time of one rank over the number of
ranks, and the ratio is the time relative to it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find `benchmarks` when run as a file
from benchmarks.loss_memory import CALLS_BEFORE, SCALE, diptych, wait
from diptych.losses.base.gather import AnnouncedSizes, GlobalBatch

Pair = Callable[[Tensor, Tensor], Tensor]


class Figures(NamedTuple):
    """Seconds and bytes of a rank, or of all ranks."""

    seconds: float
    memory: float


def place() -> tuple[int, int]:
    """Return this rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def usual(loss: str) -> Pair:
    """Return the usual form: gathered features, local logits, a cross entropy a direction."""
    scale = SCALE[loss]

    def gathered(features: Tensor, batch: GlobalBatch) -> Tensor:
        return batch.gather(features)

    def call(first: Tensor, second: Tensor) -> Tensor:
        rank, ranks = place()
        batch = GlobalBatch((len(first),) * ranks, rank)
        sides = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
        own = torch.arange(batch.offset, batch.offset + batch.size, device=first.device)
        if loss == "simclr":
            views = torch.cat(sides)
            whole = torch.cat([gathered(side, batch) for side in sides])
            logits = scale * views @ whole.T
            itself = torch.cat([own, own + batch.total])[:, None]
            logits = logits.scatter(1, itself, -math.inf)
            return F.cross_entropy(logits, torch.cat([own + batch.total, own]))
        whole = [gathered(side, batch) for side in sides]
        rows = scale * sides[0] @ whole[1].T
        if loss == "siglip":
            signs = -torch.ones_like(rows)
            signs[torch.arange(batch.size, device=first.device), own] = 1
            return -F.logsigmoid(signs * (rows - 10)).sum() / batch.size
        columns = scale * sides[1] @ whole[0].T
        return (F.cross_entropy(rows, own) + F.cross_entropy(columns, own)) / 2

    return call


def measured(call: Pair, pairs: int, options: argparse.Namespace) -> Figures:
    """Return this rank's figures on its part of the global batch."""
    once = timed(call, pairs, options)
    if not options.gpu:
        once()
        return Figures(min(once() for _ in range(options.rounds)), 0.0)
    before = torch.cuda.memory_allocated()
    for _ in range(CALLS_BEFORE):
        once()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = min(once() for _ in range(options.rounds))
    return Figures(seconds, torch.cuda.max_memory_allocated() - before)


def timed(call: Pair, pairs: int, options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that runs both passes on this rank's part, and returns its seconds."""
    rank, ranks = place()
    device = torch.device("cuda", rank) if options.gpu else torch.device("cpu")
    dtype = torch.bfloat16 if options.gpu else torch.float32
    generator = torch.Generator(device).manual_seed(rank)
    shape = pairs // ranks, options.dim
    sides = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in "ab"]
    first, second = (side.requires_grad_() for side in sides)
    clock = perf_counter if options.gpu else process_time
    checked: dict[Any, bool] = {}

    def once() -> float:
        first.grad = second.grad = None
        sizes: Any = AnnouncedSizes(len(first), 0, checked) if ranks > 1 else nullcontext()
        wait(device)
        if ranks > 1:
            dist.barrier()
        started = clock()
        with sizes:
            call(first, second).backward()
        wait(device)
        return clock() - started

    return once


def over_ranks(figures: Figures, *, gpu: bool) -> Figures:
    """Return the largest figures of all ranks; on a CPU the sum of their seconds."""
    if not dist.is_initialized():
        return figures
    values = torch.tensor(figures, dtype=torch.float64, device="cuda" if gpu else "cpu")
    total = values.clone()
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return Figures(float((values if gpu else total)[0]), float(values[1]))


def run(rank: int, ranks: int, options: argparse.Namespace, store: str, results: Any) -> None:
    """Measure every row on one of the ranks; rank 0 keeps the figures."""
    torch.set_num_threads(options.threads)
    if options.gpu:
        torch.cuda.set_device(rank)
    if ranks > 1:
        backend = "nccl" if options.gpu else "gloo"
        method = f"file://{store}"
        dist.init_process_group(backend, init_method=method, rank=rank, world_size=ranks)
    for pairs in options.sizes:
        ways = {"Diptych": diptych(options.loss, "auto"), "usual": usual(options.loss)}
        for way, call in ways.items():
            if way == "usual" and pairs**2 / ranks > options.largest:
                continue
            figures = over_ranks(measured(call, pairs, options), gpu=options.gpu)
            if rank == 0:
                results[ranks, pairs, way] = figures
                show(results, ranks, pairs, way)
    if ranks > 1:
        dist.destroy_process_group()


def show(results: Any, ranks: int, pairs: int, way: str) -> None:
    """Print a row."""
    seconds, memory = results[ranks, pairs, way]
    row = f"{pairs:>9,} {ranks:>6}  {way:8} {seconds * 1e3:11,.2f} {memory / 1e6:9,.0f}"
    alone = results.get((1, pairs, way))
    if alone is not None and ranks > 1:
        share = alone[0] / (ranks if memory else 1)  # CPU seconds of all ranks are not shared
        row += f" {share * 1e3:11,.2f} {seconds / share:7.2f}"
    print(row, flush=True)


def main() -> None:
    """Run every number of ranks and print the table."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", choices=sorted(SCALE), default="clip")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4] if gpu else [1, 2])
    sizes = [8192, 16384, 65536, 131072] if gpu else [4096, 8192]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, help="pairs, all ranks")
    parser.add_argument("--dim", type=int, default=512, help="dimension of the features")
    parser.add_argument("--rounds", type=int, default=5, help="runs per row")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")
    largest = 2**32 if gpu else 2**26
    parser.add_argument(
        "--largest", type=int, default=largest, help="logits of a rank that the usual form may hold"
    )
    options = parser.parse_args()
    options.gpu = gpu
    where = torch.cuda.get_device_name() if gpu else "CPU, milliseconds of all ranks"
    print(f"{options.loss}, D = {options.dim}, {where}, torch {torch.__version__}\n")
    print(f"{'pairs':>9} {'ranks':>6}  {'way':8} {'ms':>11} {'MB':>9} {'share':>11} {'ratio':>7}")
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        for ranks in options.ranks:
            arguments = (ranks, options, f"{folder}/{ranks}", results)
            torch.multiprocessing.spawn(run, args=arguments, nprocs=ranks)


if __name__ == "__main__":
    main()
