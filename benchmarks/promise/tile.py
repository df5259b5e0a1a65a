"""Tile: is the gradient of a contrastive loss the same in tiles, and in how much memory?

    python -m benchmarks.promise.tile --peers /path/to/peers/bin/python

NT-Xent (SimCLR, arXiv:2002.05709) of two views, forward and backward, with features of length 64 in
float32, each form and size in a separate process, on one thread. The table shows the peak memory
beyond the features and the loaded libraries, and the difference of the features' gradient from that
of the usual form in float64.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.promise.comparison import EQUAL, Comparison, Outcome, Side, distance, main

PAIRS = 1024
LENGTH, TEMPERATURE, TILE = 64, 0.5, 256

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss of two views [B, D]."""


def plain(first: Tensor, second: Tensor) -> Tensor:
    """Return the loss in the usual form: normalise, multiply, mask the diagonal, cross entropy."""
    views = F.normalize(torch.cat((first, second)), dim=-1)
    logits = (views @ views.T / TEMPERATURE).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(views)).roll(len(first)))


def recomputed(first: Tensor, second: Tensor) -> Tensor:
    """Return the loss in the usual form, with activation checkpointing."""
    value: Tensor = checkpoint(plain, first, second, use_reentrant=False)
    return value


def metric_learning() -> Loss:
    """Return pytorch-metric-learning's loss for two views."""
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    loss: Loss = SelfSupervisedLoss(NTXentLoss(temperature=TEMPERATURE))
    return loss


def diptych(tile: int | None) -> Loss:
    """Return Diptych's loss."""
    from diptych.losses import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE, tile=tile)


WAYS: dict[str, Callable[[], Loss]] = {
    "usual form": lambda: plain,
    "usual form, torch.utils.checkpoint": lambda: recomputed,
    "SelfSupervisedLoss(NTXentLoss())": metric_learning,
    "NTXentLoss(tile=None)": lambda: diptych(None),
    "NTXentLoss(tile=256)": lambda: diptych(256),
}


def features(pairs: int) -> list[Tensor]:
    """Return two views of `pairs` samples."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(pairs, LENGTH, generator=generator)
    return [hidden + torch.randn(pairs, LENGTH, generator=generator) for _ in "ab"]


def gradient(loss: Loss, views: list[Tensor]) -> Tensor:
    """Return the gradient with respect to the views."""
    leaves = [view.clone().requires_grad_() for view in views]
    loss(*leaves).backward()
    return torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None])


def peak() -> int:
    """Return the peak memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(way: str, pairs: int) -> tuple[int, float]:
    """Return the peak memory of a loss in this process, and the error of its gradient."""
    loss, views = WAYS[way](), features(pairs)
    gradient(loss, features(16))  # the first call loads libraries
    before = peak()
    found = gradient(loss, views)
    memory = peak() - before
    right = gradient(plain, [view.double() for view in views])
    return memory, distance(found - right) / distance(right)


def outcomes(*ways: str, pairs: int = PAIRS) -> Iterator[Outcome]:
    """Run each form of a library's loss with `pairs` pairs and with twice as many."""
    context = multiprocessing.get_context("fork")
    for way in ways:
        found = []
        for size in (pairs, 2 * pairs):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found.append(pool.submit(measured, way, size).result())
        (small, _), (large, difference) = found
        verdict = "equal" if difference <= EQUAL else "**differs**"
        sizes = f"{small / 1e6:.0f} MB", f"{large / 1e6:.0f} MB"
        case = f"{way}, B = {pairs:,}"
        yield Outcome(case, *sizes, difference, f"{verdict}, memory x {large / small:.1f}")


USUAL, RECOMPUTED, PEER, WHOLE, TILES = WAYS
COMPARISON = Comparison(
    "benchmarks.promise.tile",
    ("memory, B pairs", "memory, 2 B pairs"),
    {
        "torch": Side(lambda: outcomes(USUAL, RECOMPUTED), ("torch",)),
        "pytorch-metric-learning": Side(
            lambda: outcomes(PEER, pairs=128), ("pytorch-metric-learning",)
        ),
        "Diptych": Side(lambda: outcomes(WHOLE, TILES), ("diptych",)),
    },
)

if __name__ == "__main__":
    main(__doc__, COMPARISON)
