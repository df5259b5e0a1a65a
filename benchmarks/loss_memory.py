"""Time and peak memory of a loss for increasing batch sizes, compared with other libraries.

    python benchmarks/loss_memory.py
    python benchmarks/loss_memory.py --loss siglip --sizes 4096 16384

Each row is one forward and backward pass on given features: [B, 512], bfloat16 on a GPU, float32 on
a CPU. Memory is the peak beyond the features, including gradients; on a CPU it is the resident size
of a process that does nothing else. Time is the minimum of a few runs. A row says so if it does not
fit or is not installed. The ratios are relative to Diptych's first row.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import platform
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.losses import get_loss

Pair = Callable[[Tensor, Tensor], Tensor]
"""A loss of two sides [B, D]."""

SCALE = {"clip": 1 / 0.07, "siglip": 10.0, "simclr": 2.0}
TEMPERATURE = {name: 1 / scale for name, scale in SCALE.items()}


CALLS_BEFORE = 3
"""Calls before the first that counts, on a GPU."""


class Figures(NamedTuple):
    """The minimum time in seconds and the peak memory in bytes, or the reason why there is none."""

    seconds: float = math.nan
    memory: float = math.nan
    reason: str = ""


def plain(loss: str) -> Pair:
    """Return the usual form: normalise, multiply, and hold the matrix."""

    def clip(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        logits = scale * F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T
        own = torch.arange(len(first), device=first.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def siglip(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        logits = scale * F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T - 10
        signs = 2 * torch.eye(len(first), device=first.device, dtype=first.dtype) - 1
        return -F.logsigmoid(signs * logits).sum() / len(first)

    def simclr(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
        views = F.normalize(torch.cat((first, second)), dim=-1)
        logits = (scale * views @ views.T).fill_diagonal_(-math.inf)
        other = torch.arange(len(views), device=first.device).roll(len(first))
        return F.cross_entropy(logits, other)

    form = {"clip": clip, "siglip": siglip, "simclr": simclr}[loss]
    scale: list[Tensor] = []

    def call(first: Tensor, second: Tensor) -> Tensor:
        if not scale:  # learned, as in Diptych
            scale.append(torch.full((), SCALE[loss], device=first.device, requires_grad=True))
        return form(first, second, scale[0].to(first.dtype))

    return call


def compiled(loss: str) -> Pair:
    """Return the usual form with torch.compile."""
    return torch.compile(plain(loss), dynamic=False)


def diptych(loss: str, tile: str | None) -> Pair:
    """Return Diptych's loss."""
    built = get_loss(loss, tile=tile, temperature=TEMPERATURE[loss], learn_temperature=True)
    placed: list[nn.Module] = []

    def call(first: Tensor, second: Tensor) -> Tensor:
        if not placed:
            placed.append(built.to(first.device))
        value: Tensor = placed[0](first, second)
        return value

    return call


def both_ways(one_way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Pair:
    """Return CLIP's loss, built from a linear cross entropy of (features, weight, targets)."""

    def call(first: Tensor, second: Tensor) -> Tensor:
        first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
        own = torch.arange(len(first), device=first.device)
        scale = SCALE["clip"]
        return (one_way(scale * first, second, own) + one_way(scale * second, first, own)) / 2

    return call


def liger(_: str) -> Pair:
    """Return Liger-Kernel's fused linear cross entropy, once for each direction."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def one_way(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        result = LigerFusedLinearCrossEntropyFunction.apply(features, weight, targets)
        value: Tensor = result[0] if isinstance(result, tuple) else result
        return value

    return both_ways(one_way)


def cut_cross_entropy(_: str) -> Pair:
    """Return the linear cross entropy of cut-cross-entropy, once for each direction."""
    from cut_cross_entropy import linear_cross_entropy

    return both_ways(linear_cross_entropy)


def inf_clip(_: str) -> Pair:
    """Return Inf-CLIP's Triton kernels, on one GPU."""
    from inf_cl import cal_flash_loss

    def call(first: Tensor, second: Tensor) -> Tensor:
        sides = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
        value: Tensor = cal_flash_loss(*sides, scale=SCALE["clip"]).mean()
        return value

    return call


class Way(NamedTuple):
    """A row of the table: its name, the function that builds the loss, and where it runs."""

    name: str
    make: Callable[[str], Pair]
    gpu_only: bool = False
    clip_only: bool = False


WAYS = (
    Way("Diptych", lambda loss: diptych(loss, "auto")),
    Way("Diptych, tile=None", lambda loss: diptych(loss, None)),
    Way("plain", plain),
    Way("plain, compiled", compiled, gpu_only=True),
    Way("Liger-Kernel, twice", liger, gpu_only=True, clip_only=True),
    Way("cut-cross-entropy, twice", cut_cross_entropy, gpu_only=True, clip_only=True),
    Way("Inf-CLIP", inf_clip, gpu_only=True, clip_only=True),
)


class Task(NamedTuple):
    """One row to measure."""

    way: int
    loss: str
    pairs: int
    dim: int
    rounds: int


def measured(task: Task, call: Pair, device: torch.device, peak: Callable[[], float]) -> Figures:
    """Return the figures of a row; `peak` returns the peak memory in bytes since its last call."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    shape = task.pairs, task.dim
    sides = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in "ab"]
    first, second = (side.requires_grad_() for side in sides)

    def once() -> float:
        first.grad = second.grad = None
        wait(device)
        start = perf_counter()
        call(first, second).backward()
        wait(device)
        return perf_counter() - start

    before, started = peak(), perf_counter()
    seconds = once()
    memory = peak() - before
    if device.type != "cpu":  # the first calls compile kernels, and record them
        for _ in range(CALLS_BEFORE):
            once()
        first.grad = second.grad = None
        peak()
        seconds = once()
        memory = peak() - before
    if perf_counter() - started < 60:
        seconds = min([seconds, *(once() for _ in range(task.rounds - 1))])
    return Figures(seconds, memory)


def wait(device: torch.device) -> None:
    """Wait until the accelerator is idle."""
    if device.type != "cpu":
        torch.cuda.synchronize()


def on_cpu(task: Task, threads: int, gigabytes: float) -> Figures:
    """Measure a row in this process, with a limit on its memory."""
    torch.set_num_threads(threads)
    call = WAYS[task.way].make(task.loss)
    small = torch.randn(64, task.dim, requires_grad=True)
    call(small, small).backward()  # the first call loads libraries
    limit = int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    try:
        return measured(task, call, torch.device("cpu"), peak)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        return Figures(reason=f"more than {gigabytes:g} GB")


def on_gpu(task: Task) -> Figures:
    """Measure a row on the GPU."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()

    def peak() -> float:
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most

    try:
        call = WAYS[task.way].make(task.loss)
        peak()
        return measured(task, call, device, peak)
    except ImportError as error:
        return Figures(reason=f"skipped: {error}")
    except torch.OutOfMemoryError:
        return Figures(reason="out of memory")
    except Exception as error:  # noqa: BLE001 - another library may raise anything
        return Figures(reason=f"failed: {type(error).__name__}: {str(error).splitlines()[0][:60]}")


def measure(task: Task, arguments: argparse.Namespace) -> Figures:
    """Measure a row; on a CPU in a separate process."""
    if torch.cuda.is_available() and not arguments.cpu:
        return on_gpu(task)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        limits = arguments.threads, arguments.memory
        return pool.submit(on_cpu, task, *limits).result()


def print_row(name: str, pairs: int, figures: Figures, own: Figures) -> None:
    """Print a row: time and memory, and their ratios to Diptych's."""
    row = f"{pairs:>9,}  {name:24}"
    if figures.reason:
        print(f"{row}  {figures.reason}", flush=True)
        return
    row += f" {figures.seconds * 1e3:11,.1f} {figures.memory / 1e6:11,.0f}"
    ratios = figures.seconds / own.seconds, figures.memory / own.memory
    print(f"{row} {ratios[0]:7.2f} {ratios[1]:9.2f}", flush=True)


def header(arguments: argparse.Namespace, *, gpu: bool) -> str:
    """Return the header: the settings, the machine, and the names of the columns."""
    where = f"{platform.machine()} CPU, {arguments.threads} threads, float32"
    if gpu:
        where = f"{torch.cuda.get_device_name()}, bfloat16"
    title = f"{arguments.loss}, D = {arguments.dim}, {where}, torch {torch.__version__}"
    columns = f"{'pairs':>9}  {'way':24} {'ms':>11} {'MB':>11} {'x time':>7} {'x memory':>9}"
    return f"{title}\n\n{columns}"


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", choices=sorted(SCALE), default="clip")
    parser.add_argument("--sizes", type=int, nargs="+", help="pairs in a batch")
    parser.add_argument("--dim", type=int, default=512, help="dimension of the features")
    parser.add_argument("--rounds", type=int, default=3, help="runs per row")
    parser.add_argument(
        "--ways", nargs="+", help="rows to measure, by the start of their name; default: all"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="measure on the CPU even if there is a GPU"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--memory", type=float, default=16.0, help="GB that a CPU row may use")
    return parser.parse_args()


def chosen(arguments: argparse.Namespace, *, gpu: bool) -> list[int]:
    """Return the indices of the rows to measure; Diptych's row is always the first."""
    starts = tuple(arguments.ways or [""])

    def runs(index: int, way: Way) -> bool:
        if (way.gpu_only and not gpu) or (way.clip_only and arguments.loss != "clip"):
            return False
        return index == 0 or way.name.startswith(starts)

    return [index for index, way in enumerate(WAYS) if runs(index, way)]


def main() -> None:
    """Run every row and print the table."""
    arguments = parse()
    gpu = torch.cuda.is_available() and not arguments.cpu
    sizes = arguments.sizes or [2**power for power in range(12, 21 if gpu else 15)]
    print(header(arguments, gpu=gpu), flush=True)
    for pairs in sizes:
        own = Figures()
        for index in chosen(arguments, gpu=gpu):
            task = Task(index, arguments.loss, pairs, arguments.dim, arguments.rounds)
            figures = measure(task, arguments)
            own = own if index else figures
            print_row(WAYS[index].name, pairs, figures, own)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
