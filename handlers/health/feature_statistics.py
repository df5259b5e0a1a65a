"""Statistics of features: spread, uniformity, effective rank, pairs against negatives, duplicates.

They stay on the device of the features and do not synchronise, except for the effective ranks
(RankMe, LiDAR), whose decompositions do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.engine.distributed.collectives import all_reduce_sum
from diptych.engine.errors import BatchError
from diptych.engine.tasks import NO_LABEL, Outputs

DEAD = 0.1
"""A dimension is dead if its spread is below this share of an even spread, 1 / sqrt(D)."""

SAME = 0.999
"""Centred features of one side have the same content if their cosine similarity is above this."""


def name_count(*counts: int) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    """Return an attrs validator for names of the task's outputs: so many, or None."""

    def check(_: Any, attribute: attrs.Attribute[Any], names: Any) -> None:
        if names is not None and (isinstance(names, str) or len(names) not in counts):
            rule = " or ".join(map(str, counts))
            raise ValueError(f"{attribute.name} must be {rule} names in a list, got {names!r}")

    return check


def unit(features: Tensor) -> Tensor:
    """Return features [B, D] of unit length, in float32 or wider; a zero vector stays zero."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)


def moments(side: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each dimension over the batch of all ranks.

    A batch of one sample has no deviation: NaN, not the 0 of features that are all equal.

    Args:
        side: this rank's features, [B, D], or those of several sides, [S, B, D].

    Returns:
        Two tensors [D] or [S, D].
    """
    sums = side.sum(-2).flatten(), side.square().sum(-2).flatten()
    count = side.new_full((1,), side.shape[-2])
    total = all_reduce_sum(torch.cat([count, *sums]))
    mean, square = (total[1:] / total[0]).view(2, *side.shape[:-2], side.shape[-1])
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return mean, deviation.masked_fill(total[0] < 2, torch.nan)


def spread(deviation: Tensor) -> dict[str, Tensor]:
    """Return how evenly unit features fill their dimensions.

    `spread`: the mean of the dimensions' standard deviations, in units of 1 / sqrt(D), the value of
    features that cover the whole sphere. It is 1 for these and 0 if all features are equal
    (SimSiam, arXiv:2011.10566). `dead_dimensions`: the share of dimensions below `DEAD` in these
    units.

    Args:
        deviation: the standard deviation of each dimension, [D], or of several sides, [S, D].
    """
    relative = deviation * deviation.shape[-1] ** 0.5
    dead = (relative < DEAD).to(relative)
    return {"spread": relative.mean(-1), "dead_dimensions": dead.mean(-1)}


def uniformity(side: Tensor) -> Tensor:
    """Return log E exp(-2 |x - y|^2) over pairs of rows: 0 if collapsed, at least about -4.

    Source: Wang and Isola 2020, arXiv:2005.10242.

    Args:
        side: unit features [B, D], or those of several sides, [S, B, D].
    """
    potential = (4 * (side @ side.mT) - 4).exp()
    others = side.shape[-2] * (side.shape[-2] - 1)
    own = potential.diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((potential.sum((-2, -1)) - own) / others).log()


def negative_mask(rows: int, groups: Tensor | None, device: torch.device) -> Tensor:
    """Return which pairs of rows are negatives, bool [B, B]: other rows, of other groups.

    A row of group -100 or -1, as in the losses, has no group.
    """
    others = ~torch.eye(rows, dtype=torch.bool, device=device)
    if groups is None:
        return others
    groups = groups.long()  # 156 == -100 in uint8
    alone = (groups == NO_LABEL) | (groups == -1)
    return others & ((groups[:, None] != groups) | alone)


def negatives_in(outputs: Outputs, rows: int) -> Tensor:
    """Return the negatives of the first rows of a task's outputs, by their `groups` or `labels`."""
    groups = outputs.get("groups", outputs.get("labels"))
    device = next(iter(outputs.values())).device
    if groups is None or groups.ndim != 1 or groups.is_floating_point():
        return negative_mask(rows, None, device)
    return negative_mask(rows, groups[:rows], device)


def sides_of(
    outputs: Outputs,
    names: Sequence[str] | None = None,
    *,
    rows: int | None = None,
    sides: tuple[int, ...] = (1, 2),
) -> dict[str, Tensor]:
    """Return the unit features [n, D] of a task's outputs, by side: "image" of "image_features".

    Args:
        outputs: the task's outputs.
        names: the names of the features; None: the first two that end in "_features".
        rows: the most rows to return; None: all.
        sides: the allowed numbers of sides.

    Raises:
        BatchError: if the outputs lack them, or they are not [B, D] of one B.
    """
    if names is None:
        names = [name for name in outputs if name.endswith("_features")][:2]
    found = [outputs[name] for name in names if name in outputs]
    if len(found) != len(names) or len(found) not in sides or not _fit(found):
        raise BatchError(
            f"the task's outputs must have {' and '.join(names) or 'some that end in _features'} "
            f"of shape [B, D], got {_shapes(outputs)}. Name them with features="
        )
    ends = (name.removesuffix("_features") for name in names)
    return {end: unit(side[:rows]) for end, side in zip(ends, found, strict=True)}


def _fit(sides: Sequence[Tensor]) -> bool:
    return all(side.ndim == 2 and side.shape == sides[0].shape for side in sides)


def _shapes(outputs: Outputs) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in outputs.items())


def pair_statistics(first: Tensor, second: Tensor, negatives: Tensor) -> dict[str, Tensor]:
    """Compare the similarity of pairs with that of negatives.

    `positive_similarity`, `negative_similarity`: mean cosines; `margin`: their difference.
    `alignment`: the mean squared distance of a pair (arXiv:2005.10242). `auroc`: the share of a
    query's negatives that are less similar than its pair, where a tie counts half, as the mean of
    both directions; it is 0.5 at chance with any loss, and 1 if every pair is found.
    `in_batch_accuracy`: the share of queries whose pair is more similar than every negative.

    Args:
        first: unit features [B, D].
        second: unit features [B, D].
        negatives: which pairs of rows are negatives, bool [B, B].
    """
    similarity = first @ second.T
    own = similarity.diagonal()
    weights = negatives.to(similarity)
    count = weights.sum()
    positive, negative = own.mean(), (similarity * weights).sum() / count
    gap = own[:, None] - torch.stack([similarity, similarity.T])  # both directions
    return {
        "positive_similarity": positive,
        "negative_similarity": negative,
        "margin": positive - negative,
        "alignment": (first - second).square().sum(1).mean(),
        "auroc": (weights * (gap.sign() + 1)).sum() / (4 * count),
        "in_batch_accuracy": ((gap > 0) | ~negatives).all(-1).to(gap).mean(),
    }


def duplicates(sides: Tensor, ids: Sequence[Tensor], negatives: Tensor) -> Tensor:
    """Return the share of rows with a negative of the same content.

    Args:
        sides: unit features [S, B, D]; two rows have the same content if the cosine of their
            centred features is above `SAME`.
        ids: numbers [B]; two rows have the same content if their numbers are equal.
        negatives: which pairs of rows are negatives, bool [B, B].
    """
    centred = F.normalize(sides - sides.mean(1, keepdim=True), dim=2)
    same = (centred @ centred.mT > SAME).any(0)
    for numbers in ids:
        same |= numbers[:, None] == numbers
    return (same & negatives).any(1).to(sides).mean()


def text_ids(texts: Any) -> Tensor | None:
    """Return a number for each text, [B], equal for equal texts; None if these are not texts.

    Args:
        texts: strings, or tokens [B, L].
    """
    if isinstance(texts, (list, tuple)) and all(isinstance(one, str) for one in texts):
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(one, len(numbers)) for one in texts])
    if not isinstance(texts, Tensor) or texts.ndim != 2 or texts.is_floating_point():
        return None
    # A hash of each row: it needs no synchronisation, which unique() would. Products wrap around.
    positions = torch.arange(1, texts.shape[1] + 1, device=texts.device)
    factors = positions * 0x9E3779B97F4A7C1 + (positions * 0x2545F491) ** 2
    mixed = (texts.long() + 1) * factors
    return (mixed ^ (mixed >> 29)).sum(1)


def gram(side: Tensor) -> Tensor:
    """Return Z^T Z [..., D, D] of rows [..., N, D] over all ranks.

    It is in float64, which its square root needs.
    """
    wide = side.double()
    return all_reduce_sum(wide.mT @ wide)


def rankme(moment: Tensor) -> Tensor:
    """Return RankMe, the effective rank of features: from 1 to D, at most their number.

    It is the exponential of the entropy of the singular values, normalised to sum to 1.

    Source: Garrido et al. 2023, arXiv:2210.02885.

    Args:
        moment: Z^T Z of the features Z [N, D], [D, D], or of several sides, [S, D, D].
    """
    return _effective_rank(_eigenvalues(moment).sqrt())


def lidar(views: Sequence[Tensor], regularization: float = 1e-4) -> Tensor:
    """Return LiDAR, the effective rank of the differences between samples relative to their views.

    It is the effective rank of Sw^-1/2 Sb Sw^-1/2, where Sb is the covariance of the samples' means
    over their views, and Sw the covariance of the views around these means.

    Source: Thilak et al. 2024, arXiv:2312.04000.

    Args:
        views: the features of each view, [B, D], of the same samples in the same order.
        regularization: added to the diagonal of Sw.
    """
    stacked = torch.stack([view.double() for view in views])
    means = stacked.mean(0)
    within = (stacked - means).flatten(0, 1)
    count = means.new_full((1,), len(means))
    sums = all_reduce_sum(torch.cat([count, means.sum(0)]))
    samples, centred = sums[0], means - sums[1:] / sums[0]
    s_w, s_b = gram(within) / (samples * len(views)), gram(centred) / samples
    s_w.diagonal().add_(regularization)
    # L^-1 Sb L^-T, with Sw = L L^T, has the same eigenvalues and needs no square root of Sw.
    factor = torch.linalg.cholesky_ex(s_w).L
    half = torch.linalg.solve_triangular(factor, s_b, upper=False)
    return _effective_rank(_eigenvalues(torch.linalg.solve_triangular(factor, half.T, upper=False)))


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Return the eigenvalues of positive semidefinite matrices; NaN if an entry is not finite."""
    finite = matrix.abs().amax((-2, -1)) < torch.inf  # isfinite() alone would launch four kernels
    values: Tensor = torch.linalg.eigvalsh(matrix.nan_to_num(posinf=0, neginf=0)).clamp(min=0)
    return values.masked_fill(~finite[..., None], torch.nan)


def _effective_rank(values: Tensor) -> Tensor:
    shares = values / values.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy.exp()
