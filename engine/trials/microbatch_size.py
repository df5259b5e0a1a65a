"""The largest micro-batch that fits into an accelerator's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diptych.engine.data.batches import batch_size
from diptych.engine.distributed.collectives import world_size
from diptych.engine.errors import BatchError
from diptych.engine.trainer import Trainer
from diptych.engine.trials.restored import parts_preserved

UPDATES = 2
"""Updates of a trial: the first one makes the optimizer's state."""


def find_microbatch_size(trainer: Trainer, batch: Any, *, headroom: float = 0.1) -> int:
    """Return the largest `microbatch_size` whose updates fit into the accelerator's memory.

    It makes two updates with the whole batch, with half of it, and so on, until they fit; the
    trainer, its model, loss and optimizer, and the random generators are as before. A micro-batch
    changes no result, so the number need not be the same everywhere.

    ```python
    size = find_microbatch_size(trainer, next(iter(loader)))
    ```

    While it searches it holds a copy of the parameters and of the optimizer's state, so the result
    is on the safe side. Handlers are not called: their memory belongs to the headroom.

    Args:
        trainer: on an accelerator, in a single process.
        batch: a batch as large as the largest of the run.
        headroom: share of the accelerator's memory to leave free, in [0, 1).

    Raises:
        ValueError: if the trainer is on a CPU, there are several ranks, or `headroom` is out of
            range.
        BatchError: if a single sample does not fit.
    """
    if not 0 <= headroom < 1:
        raise ValueError(f"headroom must lie in [0, 1), got {headroom}")
    if trainer.device.type != "cuda":
        raise ValueError(
            f"trainer must be on a GPU to measure its memory, got {trainer.device}. On a CPU, "
            "choose microbatch_size by the memory that the process takes"
        )
    if world_size() > 1:
        raise ValueError(
            f"find_microbatch_size must be called in a single process, got {world_size()} ranks: "
            "a rank without memory would leave the others waiting. Call it in a script of its own, "
            "with one rank's share of the batch"
        )

    def fits(size: int) -> bool:
        return _updates_fit(trainer, batch, size, headroom)

    return largest(batch_size(batch), fits)


def largest(samples: int, fits: Callable[[int], bool]) -> int:
    """Return the first of the halves of a number of samples that fits.

    Raises:
        BatchError: if none does.
    """
    while samples >= 1:
        if fits(samples):
            return samples
        samples = samples // 2
    raise BatchError(
        "batch must fit into the accelerator's memory one sample at a time, got none that does. "
        "Use a smaller model, gradient checkpointing, or shard=True on several GPUs"
    )


def _updates_fit(trainer: Trainer, batch: Any, size: int, headroom: float) -> bool:
    device = trainer.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with parts_preserved(trainer), trainer.renewed(microbatch_size=size):
            trainer.run([batch], max_iters=UPDATES)
    except torch.OutOfMemoryError:
        return False
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.max_memory_reserved(device) <= (1 - headroom) * total
