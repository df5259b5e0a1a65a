"""Tiled objectives: `contrast` and `sigmoid_contrast` in memory linear in the batch.

They equal the plain objectives (`diptych.losses.base.objectives`) in value and gradient and hold,
instead of the n x m logits, one block of them at a time; the backward computes the blocks again.
Both are custom operators, which `torch.compile` takes as they are, and which differentiate once.

What a group's positives add to a loss linearly, a mean of logits, is an anchor times a mean of
candidates: it is added from outside, and the blocks see one positive for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.tiles import operators
from diptych.losses.base.contrastive import normalized
from diptych.losses.base.positives import Positives
from diptych.losses.base.tiles.operators import kernels_take
from diptych.losses.base.tiles.torch_blocks import Entries
from diptych.losses.base.validation import working_dtype

_PLAIN_LOGITS = {"cpu": 2**24, "cuda": 2**26}
_BLOCK_LOGITS = {"cpu": 2**22, "cuda": 2**25}
_LEAST_ROWS = {"cpu": 32, "cuda": 512}


def resolve_tile(tile: int | str | None, anchors: Tensor, candidates: Tensor) -> int | None:
    """Return the number of rows of a block, or None for the plain form.

    ``"auto"`` takes the plain form up to 8192 x 8192 logits on an accelerator and 4096 x 4096
    on a CPU: there memory is no concern. Beyond, blocks have 32 Mi and 4 Mi logits, and no
    fewer than 512 and 32 rows.

    Args:
        tile: ``"auto"``, None (plain) or a number of rows.
        anchors: [n, D].
        candidates: [m, D].
    """
    if not isinstance(tile, str):
        return tile
    kind = "cpu" if anchors.device.type == "cpu" else "cuda"
    columns = candidates.shape[0]
    if anchors.shape[0] * columns <= _PLAIN_LOGITS[kind]:
        return None
    return max(_LEAST_ROWS[kind], _BLOCK_LOGITS[kind] // columns)


def tiled_contrast(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    positives: Positives,
    *,
    rows: int,
    kind: str = "outside",
    decoupled: bool = False,
    label_smoothing: float = 0.0,
    symmetric: bool = False,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return what `contrast` returns: the InfoNCE losses of all anchors, summed, a scalar.

    Args:
        anchors: [n, D].
        candidates: [m, D].
        scale: 0-dim.
        positives: Which candidates match.
        rows: Rows of a block, >= 1.
        kind: ``"outside"``, ``"inside"`` or ``"mask"``.
        decoupled: Whether positives are left out of the denominator.
        label_smoothing: The share of the target spread evenly over the denominator's columns.
        symmetric: Whether the candidates are anchors too; own pairs then stand on the diagonal.
        normalize: Whether features are still to be divided by their norms.
        dtype: What the features came in. bfloat16 and float16 on a GPU with Triton are multiplied
            as such, and summed in float32; everywhere else the blocks are float32 or float64.
    """
    averaged = positives.grouped and kind == "outside"
    adds_linear = averaged or label_smoothing > 0
    late = normalize and not adds_linear and kernels_take(anchors, dtype)
    anchors, candidates = _prepare(anchors, candidates, dtype, normalize=normalize and not late)
    scale = scale.to(working_dtype(anchors))
    positives = _with_partner(positives)
    valid = _valid(positives, decoupled=decoupled)
    entries = _entries(positives, kind, decoupled=decoupled)
    settings = (valid, decoupled, label_smoothing, symmetric, late, rows)
    loss: Tensor = operators.contrast(anchors, candidates, scale, *entries, *settings)[0]
    if not adds_linear:
        return loss
    for first, second in ((anchors, candidates), (candidates, anchors))[: 1 + symmetric]:
        point = _linear_part(
            second, positives, kind, decoupled=decoupled, smoothing=label_smoothing
        )
        linear = (first.to(scale.dtype) * point).sum(1).masked_fill(~valid, 0.0)
        loss = loss + scale * linear.sum()
    return loss


def tiled_sigmoid_contrast(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    bias: Tensor,
    positives: Positives,
    *,
    rows: int,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return what `sigmoid_contrast` returns: all pairs' sigmoid losses, summed, a scalar.

    Args:
        anchors: [n, D].
        candidates: [m, D].
        scale: 0-dim.
        bias: 0-dim.
        positives: Which candidates match.
        rows: Rows of a block, >= 1.
        normalize: As for `tiled_contrast`.
        dtype: As for `tiled_contrast`.
    """
    late = normalize and kernels_take(anchors, dtype)
    anchors, candidates = _prepare(anchors, candidates, dtype, normalize=normalize and not late)
    scale, bias = (number.to(working_dtype(anchors)) for number in (scale, bias))
    loss: Tensor = operators.sigmoid_contrast(
        anchors, candidates, scale, bias, *_entries(positives)[:4], late, rows
    )
    return loss


def _prepare(
    anchors: Tensor, candidates: Tensor, dtype: torch.dtype | None, *, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Return the features as the blocks take them, normalised if that is still to be done."""
    if normalize:
        anchors, candidates = normalized(anchors), normalized(candidates)
    if kernels_take(anchors, dtype):
        anchors, candidates = anchors.to(dtype), candidates.to(dtype)
    return anchors, candidates


def _with_partner(positives: Positives) -> Positives:
    """Return positives in which every anchor has a partner.

    Where groups alone decide, it is any other member of the anchor's group, so that the positive
    that is subtracted inside the blocks comes from the same product as the negatives; an anchor
    without one gets any column, and is not valid.
    """
    if positives.partner is not None:
        return positives
    assert positives.row_groups is not None, "Positives needs a partner or groups"
    assert positives.column_groups is not None
    ordered, order = positives.column_groups.sort(stable=True)
    last = positives.candidates - 1
    start = torch.searchsorted(ordered, positives.row_groups.contiguous()).clamp(max=last)
    partner = order[start]
    if positives.itself is not None:
        partner = torch.where(
            partner == positives.itself, order[(start + 1).clamp(max=last)], partner
        )
    return positives._replace(partner=partner)


def _entries(positives: Positives, kind: str = "inside", *, decoupled: bool = False) -> Entries:
    """Return what the entries of the logits are to the blocks."""
    positives = _with_partner(positives)
    assert positives.partner is not None
    entries = Entries(positives.partner, positives.itself)
    if not positives.grouped or (kind == "outside" and not decoupled):
        return entries
    return entries._replace(
        row_groups=positives.row_groups,
        column_groups=positives.column_groups,
        group_matches=kind == "inside",
    )


def _valid(positives: Positives, *, decoupled: bool) -> Tensor:
    """Return which anchors have a positive and a denominator, bool [n]."""
    counts = positives.counts()
    valid = counts > 0
    if decoupled:
        valid = valid & (counts < positives.candidates - (positives.itself is not None))
    return valid


def _linear_part(
    candidates: Tensor, positives: Positives, kind: str, *, decoupled: bool, smoothing: float
) -> Tensor:
    """Return the point c [n, D] by which an anchor's loss differs by scale * anchor . c.

    The blocks subtract (1 - smoothing) times the partner's logit. ``outside`` wants the mean over
    all positives, and smoothing the mean over the denominator.
    """
    candidates = candidates.to(working_dtype(candidates))
    partner = candidates[positives.partner]
    matching, counts = partner, positives.counts()[:, None]
    itself = 0.0 if positives.itself is None else candidates[positives.itself]
    if positives.grouped:
        matching = _group_sums(candidates, positives) - itself
    point = torch.zeros_like(partner)
    if kind == "outside":
        point = (1 - smoothing) * (partner - matching / counts.clamp(min=1))
    kept = candidates.sum(0) - itself
    number = torch.full_like(counts, positives.candidates - (positives.itself is not None))
    if decoupled or kind == "mask":
        kept, number = kept - matching, number - counts
    if kind == "mask" and not decoupled:
        kept, number = kept + partner, number + 1
    return point - smoothing * kept / number.clamp(min=1)


def _group_sums(candidates: Tensor, positives: Positives) -> Tensor:
    """Return, for each row, the sum of the candidates of its group, [n, D]."""
    assert positives.row_groups is not None
    assert positives.column_groups is not None
    ordered = positives.column_groups.sort().values
    # The first place of an id among the sorted ones numbers its group without a synchronisation.
    columns = torch.searchsorted(ordered, positives.column_groups.contiguous())
    rows = torch.searchsorted(ordered, positives.row_groups.contiguous())
    sums = torch.zeros_like(candidates).index_add(0, columns, candidates)
    return sums[rows.clamp(max=positives.candidates - 1)]
