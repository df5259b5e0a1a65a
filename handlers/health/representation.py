"""Statistics of representations: how far they spread, and how pairs stand among strangers.

All of them stay on the device of the features and wait for nothing, but for the spectra (RankMe,
LiDAR), whose decompositions wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.engine.distributed.collectives import sum_over_ranks
from diptych.engine.errors import BatchError
from diptych.engine.tasks import Outputs

DEAD = 0.1
"""A dimension whose spread is below this share of an even spread, 1 / sqrt(D), carries nothing."""

SAME = 0.999
"""Centred features of one side whose cosine similarity is above show one and the same content."""


def unit(features: Tensor) -> Tensor:
    """Return features [B, D] at unit length, in float32 or wider; a zero vector stays zero."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)


def moments(side: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each dimension over the batch of all ranks, [D] each.

    Args:
        side: this rank's, [B, D].
    """
    count = side.new_full((1,), len(side))
    sums = sum_over_ranks(torch.cat([count, side.sum(0), side.square().sum(0)]))
    mean, square = (sums[1:] / sums[0]).chunk(2)
    return mean, (square - mean.square()).clamp(min=0).sqrt()


def spread(deviation: Tensor) -> dict[str, Tensor]:
    """Return how evenly unit features fill their dimensions.

    `spread`: the mean of the dimensions' standard deviations, in units of 1 / sqrt(D), which is
    that of features all over the sphere: 1 there, 0 where all are one point (SimSiam,
    arXiv:2011.10566). `dead_dimensions`: the share of those below `DEAD` of it.

    Args:
        deviation: of each dimension, [D].
    """
    relative = deviation * len(deviation) ** 0.5
    return {"spread": relative.mean(), "dead_dimensions": (relative < DEAD).to(relative).mean()}


def uniformity(side: Tensor) -> Tensor:
    """Return log E exp(-2 |x - y|^2) over different rows: 0 collapsed, -4 about the least.

    Source: Wang and Isola 2020, arXiv:2005.10242.

    Args:
        side: unit features [B, D].
    """
    potential = (4 * (side @ side.T) - 4).exp()
    others = len(side) * (len(side) - 1)
    return ((potential.sum() - potential.diagonal().sum()) / others).log()


def strangers(rows: int, groups: Tensor | None, device: torch.device) -> Tensor:
    """Return which pairs of rows do not match, bool [B, B]: other rows, of other groups."""
    if groups is not None:
        return groups[:, None] != groups
    return ~torch.eye(rows, dtype=torch.bool, device=device)


def strangers_in(outputs: Outputs, rows: int) -> Tensor:
    """Return the same for the first rows of a task's outputs, by their `groups` or `labels`."""
    groups = outputs.get("groups", outputs.get("labels"))
    device = next(iter(outputs.values())).device
    if groups is None or groups.ndim != 1 or groups.is_floating_point():
        return strangers(rows, None, device)
    return strangers(rows, groups[:rows], device)


def sides_of(
    outputs: Outputs,
    names: Sequence[str] | None = None,
    *,
    rows: int | None = None,
    sides: tuple[int, ...] = (1, 2),
) -> dict[str, Tensor]:
    """Return the unit features [n, D] of a task's outputs, by side: "image" of "image_features".

    Args:
        outputs: the task's.
        names: which of them; None: the first two that end in "_features".
        rows: how many rows at most; None: all.
        sides: how many sides there may be.

    Raises:
        BatchError: if the outputs lack them, or they are not [B, D] of one B.
    """
    if names is None:
        names = [name for name in outputs if name.endswith("_features")][:2]
    found = [outputs[name] for name in names if name in outputs]
    if len(found) != len(names) or len(found) not in sides or not _fit(found):
        raise BatchError(
            f"the task's outputs must have {' and '.join(names) or 'some that end in _features'} "
            f"of shape [B, D], got {_shapes(outputs)}: name them with features="
        )
    ends = (name.removesuffix("_features") for name in names)
    return {end: unit(side[:rows]) for end, side in zip(ends, found, strict=True)}


def _fit(sides: Sequence[Tensor]) -> bool:
    return all(side.ndim == 2 and len(side) == len(sides[0]) for side in sides)


def _shapes(outputs: Outputs) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in outputs.items())


def pairs(first: Tensor, second: Tensor, negatives: Tensor) -> dict[str, Tensor]:
    """Return how the two sides of a pair stand to one another and to strangers.

    `positive_similarity`, `negative_similarity`: mean cosines; `margin`: their difference.
    `alignment`: the mean squared distance of a pair (arXiv:2005.10242). `auroc`: the share of a
    query's strangers that are less similar than its pair, ties by half, the mean of both
    directions: 0.5 at chance whatever the loss, 1 where every pair is found. `in_batch_accuracy`:
    the share of queries whose pair is more similar than every stranger.

    Args:
        first: unit features [B, D].
        second: unit features [B, D].
        negatives: which pairs do not match, bool [B, B].
    """
    similarity = first @ second.T
    own = similarity.diagonal()
    weights = negatives.to(similarity)
    negative = (similarity * weights).sum() / weights.sum()
    below, best = [], []
    for scores in (similarity, similarity.T):
        gap = own[:, None] - scores
        share = (gap.sign() + 1) / 2 * weights
        below.append(share.sum() / weights.sum())
        best.append(((gap > 0) | ~negatives).all(1).to(gap).mean())
    return {
        "positive_similarity": own.mean(),
        "negative_similarity": negative,
        "margin": own.mean() - negative,
        "alignment": (first - second).square().sum(1).mean(),
        "auroc": torch.stack(below).mean(),
        "in_batch_accuracy": torch.stack(best).mean(),
    }


def duplicates(sides: Sequence[Tensor], contents: Sequence[Tensor], negatives: Tensor) -> Tensor:
    """Return the share of rows whose content another row has too that counts as a negative.

    Args:
        sides: unit features [B, D]; after their mean is taken out, a cosine above `SAME` is one
            content.
        contents: numbers [B] that are equal where what the model was given is equal.
        negatives: which pairs do not match, bool [B, B].
    """
    same = torch.zeros_like(negatives)
    for side in sides:
        centred = F.normalize(side - side.mean(0), dim=1)
        same |= centred @ centred.T > SAME
    for numbers in contents:
        same |= numbers[:, None] == numbers
    return (same & negatives).any(1).to(sides[0]).mean()


def gram(side: Tensor) -> Tensor:
    """Return Z^T Z [D, D] over the rows of all ranks, in float64, whose roots are exact enough."""
    wide = side.double()
    return sum_over_ranks(wide.T @ wide)


def rankme(moment: Tensor) -> Tensor:
    """Return RankMe, the effective rank of features: from 1 to D, and at most their number.

    The exponential of the entropy of the singular values, divided by their sum.

    Source: Garrido et al. 2023, arXiv:2210.02885.

    Args:
        moment: Z^T Z of the features Z [N, D], [D, D].
    """
    return _effective_rank(_eigenvalues(moment).sqrt())


def lidar(views: Sequence[Tensor], regularization: float = 1e-4) -> Tensor:
    """Return LiDAR, the effective rank of what tells samples apart beyond what tells views apart.

    The same exponential for the eigenvalues of Sw^-1/2 Sb Sw^-1/2, where Sb is the covariance of
    the samples' means over their views and Sw that of the views around them.

    Source: Thilak et al. 2024, arXiv:2312.04000.

    Args:
        views: the features of each view, [B, D], of the same samples in the same order.
        regularization: what is added to the diagonal of Sw.
    """
    stacked = torch.stack([view.double() for view in views])
    means = stacked.mean(0)
    within = (stacked - means).flatten(0, 1)
    count = means.new_full((1,), len(means))
    sums = sum_over_ranks(torch.cat([count, means.sum(0)]))
    centred = means - sums[1:] / sums[0]
    samples = sums[0]
    s_w, s_b = gram(within) / (samples * len(views)), gram(centred) / samples
    s_w.diagonal().add_(regularization)
    # The eigenvalues of a symmetric form of Sw^-1 Sb, without the root of Sw.
    factor = torch.linalg.cholesky_ex(s_w).L
    half = torch.linalg.solve_triangular(factor, s_b, upper=False)
    return _effective_rank(_eigenvalues(torch.linalg.solve_triangular(factor, half.T, upper=False)))


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Return those of a positive semidefinite matrix; NaN where an entry is not finite."""
    finite = matrix.isfinite().all()
    values = torch.linalg.eigvalsh(matrix.nan_to_num(posinf=0, neginf=0)).clamp(min=0)
    return torch.where(finite, values, torch.nan)


def _effective_rank(values: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(values / values.sum()).sum()
    return entropy.exp()
