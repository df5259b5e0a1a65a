"""Contrastive losses on ranks whose losses have different weights, against loops over one batch.

One product of a rank's anchors with all candidates serves rows and columns, so a rank's gradient
holds a part of the losses of other ranks, with the weights that they have there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from diptych.losses import (
    CLIPLoss,
    DecoupledContrastiveLoss,
    NTXentLoss,
    SigLIPLoss,
    SupervisedContrastiveLoss,
)
from tests.losses.oracles import draw
from tests.losses.ranks import Ranks

GROUPS = [4, 1, 4, 2, 1, 4, 3]
COUNT = len(GROUPS)
SPLITS = ((2, 0, 5), pytest.param((3, 4), marks=pytest.mark.slow))
WEIGHTS = (1.0, -3.0, 0.5)
TAU = 0.2

Weighted = list[tuple[int, Tensor]]
"""Losses with the sample that each belongs to."""


def info_nce(
    values: Tensor, positives: list[int], kept: list[int], *, inside: bool = False, share: float = 0
) -> Tensor:
    """Return the loss of one anchor from its logits."""
    own = values[positives]
    numerator = own.logsumexp(0) if inside else own.mean()
    denominator = values[kept]
    return denominator.logsumexp(0) - (1 - share) * numerator - share * denominator.mean()


def clip(first: Tensor, second: Tensor, kind: str, share: float) -> Weighted:
    matrix, found = first @ second.T / TAU, []
    for rows in (matrix, matrix.T):
        for i, values in enumerate(rows):
            group = [j for j in range(COUNT) if GROUPS[j] == GROUPS[i]]
            masked = kind == "mask"
            kept = [j for j in range(COUNT) if not masked or j == i or j not in group]
            positives = [i] if masked else group
            loss = info_nce(values, positives, kept, inside=kind == "inside", share=share)
            found.append((i, loss))
    return found


def siglip(first: Tensor, second: Tensor) -> Weighted:
    matrix = first @ second.T / TAU - 10
    found = []
    for i, values in enumerate(matrix):
        signs = [1.0 if GROUPS[i] == GROUPS[j] else -1.0 for j in range(COUNT)]
        found.append((i, F.softplus(-values * torch.tensor(signs)).sum()))
    return found


def views(first: Tensor, second: Tensor, form: str) -> Weighted:
    """Return the losses of NT-Xent ("simclr") and of supervised contrast, by its candidates."""
    matrix = torch.cat([first, second]) @ torch.cat([first, second]).T / TAU
    found = []
    for i, values in enumerate(matrix):
        kept = {
            "intra": [k for k in range(2 * COUNT) if k != i and (k < COUNT) == (i < COUNT)],
            "cross": [k for k in range(2 * COUNT) if (k < COUNT) != (i < COUNT)],
        }.get(form, [k for k in range(2 * COUNT) if k != i])
        positives = [k for k in kept if GROUPS[k % COUNT] == GROUPS[i % COUNT]]
        if positives:
            found.append((i % COUNT, info_nce(values, positives, kept)))
    return found


def decoupled(first: Tensor, second: Tensor) -> Weighted:
    matrix = torch.cat([first, second]) @ torch.cat([first, second]).T / TAU
    cosine = (first * second).sum(1).detach()
    weights = 2 - COUNT * (cosine / 0.5).softmax(0)
    found = []
    for i, values in enumerate(matrix):
        kept = [k for k in range(2 * COUNT) if GROUPS[k % COUNT] != GROUPS[i % COUNT]]
        own = values[(i + COUNT) % (2 * COUNT)]
        found.append((i % COUNT, values[kept].logsumexp(0) - weights[i % COUNT] * own))
    return found


LOSSES: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor], Weighted]]] = {
    **{
        f"clip, {kind}, {share}": (
            partial(CLIPLoss, positives=kind, label_smoothing=share),
            partial(clip, kind=kind, share=share),
        )
        for kind, share in [("outside", 0.0), ("inside", 0.1), ("mask", 0.0)]
    },
    "siglip": (SigLIPLoss, siglip),
    "simclr": (partial(NTXentLoss, learn_temperature=True), partial(views, form="simclr")),
    "decoupled": (
        partial(DecoupledContrastiveLoss, sigma=0.5, learn_temperature=True),
        decoupled,
    ),
    **{
        f"supervised, {form}": (
            partial(SupervisedContrastiveLoss, candidates=form, learn_temperature=True),
            partial(views, form=form),
        )
        for form in ("all", "cross", "intra")
    },
}


def sides() -> tuple[Tensor, Tensor]:
    return draw(COUNT, 8), draw(COUNT, 8, seed=1)


def expected(name: str, sizes: Sequence[int]) -> list[Tensor]:
    """Return the weighted loss, and its gradients for the features and ln(1 / tau)."""
    first, second = (side.requires_grad_() for side in sides())
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    weights = [w for w, size in zip(WEIGHTS, sizes, strict=False) for _ in range(size)]
    scaled = F.normalize(first) * log_scale.exp(), F.normalize(second)
    if name.startswith(("simclr", "decoupled", "supervised")):
        root = (log_scale / 2).exp()
        scaled = F.normalize(first) * root, F.normalize(second) * root
    losses = LOSSES[name][1](*scaled)
    count = COUNT if name.startswith(("clip", "siglip")) else len(losses)
    halved = 2 if name.startswith("clip") else 1
    total = torch.stack([weights[i] * loss for i, loss in losses]).sum() / (count * halved)
    return [total, *torch.autograd.grad(total, (first, second, log_scale))]


def measure(sizes: tuple[int, ...]) -> dict[tuple[str, int | None], list[Tensor]]:
    """Return the same for every loss, in tiles and whole, from this rank's samples and weight."""
    rank, ranks = dist.get_rank(), len(sizes)
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    found = {}
    for name, (build, _) in LOSSES.items():
        for tile in (None, 2):
            first, second = (side.requires_grad_() for side in sides())
            loss = build(temperature=TAU, tile=tile).double()
            value = WEIGHTS[rank] / ranks * loss(first[own], second[own], torch.tensor(GROUPS)[own])
            scale = loss.temperature.logit_scale
            gradients = torch.autograd.grad(value, (first, second, scale))
            summed = [value.detach(), *gradients]
            for tensor in summed:
                dist.all_reduce(tensor)
            found[name, tile] = summed
    return found


@pytest.mark.parametrize("sizes", SPLITS)
def test_ranks_with_different_weights_get_the_gradients_of_the_weighted_batch(
    sizes: tuple[int, ...], ranks: Ranks
) -> None:
    for found in ranks.run(measure, [(sizes,)] * len(sizes)):
        for (name, tile), values in found.items():
            torch.testing.assert_close(
                values,
                expected(name, sizes),
                rtol=1e-10,
                atol=1e-12,
                msg=lambda text, name=name, tile=tile: f"{name}, tile {tile}: {text}",
            )
