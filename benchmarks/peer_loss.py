"""CLIP's loss over ranks as most people write it, to compare with.

Each rank gathers the features of all ranks, with gradient, and computes the logits [b, B] of its
own samples twice: for its images and for its texts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from diptych.engine.distributed.collectives import rank, world_size

_c10d: Any = dist
"""The collectives of torch, whose names change in 2.13."""
ALL_GATHER: Any = getattr(_c10d, "all_gather_single", _c10d.all_gather_into_tensor)
REDUCE_SCATTER: Any = getattr(_c10d, "reduce_scatter_single", _c10d.reduce_scatter_tensor)


class _Gather(torch.autograd.Function):
    """Concatenate the rows of all ranks; backward, add up the gradients of this rank's rows."""

    @staticmethod
    def forward(_: Any, rows: Tensor) -> Tensor:
        found = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        ALL_GATHER(found, rows.contiguous())
        return found

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        own = gradient.new_empty(len(gradient) // world_size(), *gradient.shape[1:])
        REDUCE_SCATTER(own, gradient.contiguous())
        return own


def gathered(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, by rank, with gradient; all ranks have equally many."""
    result: Tensor = _Gather.apply(rows) if world_size() > 1 else rows
    return result


def peer_loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """Return this rank's part of CLIP's loss; the mean over ranks is that of the global batch."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    labels = torch.arange(len(image), device=image.device) + rank() * len(image)
    scale = log_scale.exp()
    rows = F.cross_entropy(scale * image @ gathered(text).T, labels)
    columns = F.cross_entropy(scale * text @ gathered(image).T, labels)
    return (rows + columns) / 2
