"""The update of a sharded model in a trainer, and in a plain loop with torch's `fully_shard`.

`train_step_ranks.py --samples --sharded 40` prints the table. The model has 1.04 G parameters (24
and 12 blocks of width 1536; on a CPU a tiny one); it is made on the device, where its random values
take no time.
Python's garbage collector is off, so that the memory held by reference cycles shows.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Events
from torch import Tensor, nn

from benchmarks.peer_loss import peer_loss
from benchmarks.train_step import CUDA, ImageText, autocast, finish, resident
from diptych.engine import Trainer, tasks
from diptych.engine.distributed.collectives import rank
from diptych.losses import CLIPLoss

WIDE = {"width": 1536, "image_layers": 24, "text_layers": 12, "pixels": 224}
TINY = {"width": 64, "image_layers": 2, "text_layers": 2, "pixels": 32}
WARMUP = 3
GB = 1e9


DEVICE = "cuda" if CUDA else "cpu"


def wide_model(device: str = DEVICE) -> ImageText:
    """Return the model, the same each time."""
    torch.manual_seed(0)
    with torch.device(device):
        return ImageText(**(WIDE if CUDA else TINY))


def ours(batch: dict[str, Tensor], updates: int, stamp: Callable[[], None]) -> None:
    """Run a trainer with `shard=True`."""
    model, loss = wide_model(), CLIPLoss().to(DEVICE)
    weights = [*model.parameters(), *loss.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=CUDA)
    precision: Any = "bf16" if CUDA else "fp32"
    trainer = Trainer(
        model, loss, optimizer, task=tasks.image_text, precision=precision, shard=True
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, stamp)
    trainer.run([batch] * updates)


def by_hand(batch: dict[str, Tensor], updates: int, stamp: Callable[[], None]) -> None:
    """Run a plain loop with `fully_shard` under autocast, as the trainer computes."""
    _loop(batch, updates, stamp, {})


def by_hand_in_bf16(batch: dict[str, Tensor], updates: int, stamp: Callable[[], None]) -> None:
    """Run a plain loop whose gathered parameters are bf16: norms and biases are rounded too."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _loop(batch, updates, stamp, {"mp_policy": policy})


def _loop(
    batch: dict[str, Tensor], updates: int, stamp: Callable[[], None], options: dict[str, Any]
) -> None:
    from torch.distributed.fsdp import fully_shard

    model = wide_model()
    for tower in (model.image, model.text):
        for block in tower.layers.layers:
            fully_shard(block, **options)
    fully_shard(model, **options)
    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), device=DEVICE))
    groups = [{"params": [*model.parameters()]}, {"params": [log_scale]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=CUDA)
    for _ in range(updates):
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            value = peer_loss(*model(batch["image"], batch["text"]), log_scale)
        value.backward()
        dist.all_reduce(log_scale.grad, op=dist.ReduceOp.SUM)
        log_scale.grad /= dist.get_world_size()
        optimizer.step()
        stamp()


class Stamps:
    """Measures updates: their time after a warm-up, and the memory allocated after each."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.allocated: list[int] = []

    def __call__(self) -> None:
        """Measure after an update; the device is waited for only at the warm-up's end."""
        self.allocated.append(torch.cuda.memory_allocated() if CUDA else 0)
        if len(self.allocated) == WARMUP:
            finish()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
        self.times.append(time.perf_counter())


def row(
    name: str, loop: Callable[..., None], batch: dict[str, Tensor], updates: int
) -> tuple[float, int]:
    """Measure a loop, print its row, and return the time of an update and its memory."""
    gc.collect()
    gc.disable()
    if CUDA:
        torch.cuda.empty_cache()
    stamps = Stamps()
    try:
        loop(batch, updates, stamps)
        finish()
        seconds = (time.perf_counter() - stamps.times[WARMUP - 1]) / (updates - WARMUP)
        peak = torch.cuda.max_memory_allocated() if CUDA else 0
    finally:
        gc.enable()
        gc.collect()
    held = stamps.allocated[-1]
    if rank() == 0:
        memory = f"{stamps.allocated[0] / GB:.2f} | {held / GB:.2f} | {peak / GB:.1f}"
        print(f"| {name} | {updates} | {seconds * 1e3:.0f} | {memory} |", flush=True)
    return seconds, held


def compare(samples: int, updates: int) -> None:
    """Print the table of the sharded model.

    Args:
        samples: of each rank.
        updates: of each loop, more than the 3 that are not measured.
    """
    batch = resident(samples)
    if rank() == 0:
        count = sum(p.numel() for p in wide_model("meta").parameters())
        print(f"\nsharded: {count:,} parameters, {samples} samples a rank\n")
        print("| loop | updates | ms | GB after the first | after the last | at most |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
    hand = row("fully_shard", by_hand, batch, updates)
    trainer = row("diptych, shard=True", ours, batch, updates)
    if CUDA:
        row("fully_shard, parameters gathered in bf16", by_hand_in_bf16, batch, WARMUP + 10)
    if rank() == 0:
        memory = f", {trainer[1] / hand[1]:.3f} of its memory after an update" if CUDA else ""
        print(f"\ndiptych takes {trainer[0] / hand[0]:.3f} of the time of fully_shard{memory}")
