"""Objectives: pure functions from logits, or from features, to losses.

`masked_info_nce`, `sigmoid`, `hinge` and `off_diagonal` take a matrix. `contrast` and
`sigmoid_contrast` take features and a `tile`: starting from features, a loss need not hold the
matrix.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.losses.base.gather import GlobalBatch, max_over_ranks, sum_over_ranks
from diptych.losses.base.normalization import normalize_in_float32
from diptych.losses.base.positives import Positives
from diptych.losses.base.tiles.half_precision import half_logits
from diptych.losses.base.tiles.operators import kernels_take
from diptych.losses.base.tiles.tiled_objectives import (
    resolve_tile,
    tiled_contrast,
    tiled_sigmoid_contrast,
)
from diptych.losses.base.tiles.torch_blocks import LossBlocks, TileSettings
from diptych.losses.base.validation import check_choice

Tile = int | str | None
"""The tiling of a loss: ``"auto"``, None (the whole matrix), or the number of rows of a tile."""

POSITIVE_KINDS = ("outside", "inside", "mask")
"""How several positives of one anchor are combined; see `contrast`."""


def masked_info_nce(
    logits: Tensor,
    positives: Tensor,
    kept: Tensor | None = None,
    *,
    log_weights: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    spread: bool = False,
) -> Tensor:
    """Return each row's logsumexp over the denominator minus mean or logsumexp over positives.

    Args:
        logits: [n, m].
        positives: Bool [n, m], the numerator.
        kept: Bool [n, m], the denominator; None: all columns. It need not contain the positives.
        log_weights: [n, m], the logs of weights on the terms of the denominator.
        reduction: ``"mean"``: the mean of log-probabilities (the sum is outside the log);
            ``"logsumexp"``: the log of the summed probability (the sum is inside the log).
        label_smoothing: The share of the target that is spread evenly over the kept columns.
        spread: Whether the entries of each row are spread over the ranks: every rank has all rows,
            and columns of its own.

    Returns:
        [n]; exactly 0, with zero gradient, for a row without a positive or without a kept column.
    """
    # An empty row is computed on all its columns and set to 0 at the end. Masking it to -inf first
    # would leave a NaN in the gradient that no later `where` removes.
    empty = _count(positives, spread=spread) == 0
    if kept is not None:
        empty = empty | (_count(kept, spread=spread) == 0)
    empty = empty[:, None]
    denominator = logits if log_weights is None else logits + log_weights
    if kept is not None:
        denominator = denominator.masked_fill(~(kept | empty), -math.inf)
    if reduction == "mean":
        numerator = masked_mean(logits, positives, spread=spread)
    else:
        numerator = logits.masked_fill(~(positives | empty), -math.inf)
        numerator = _logsumexp(numerator, spread=spread)
    if label_smoothing:
        even = masked_mean(
            logits, torch.ones_like(positives) if kept is None else kept, spread=spread
        )
        numerator = (1 - label_smoothing) * numerator + label_smoothing * even
    losses = _logsumexp(denominator, spread=spread) - numerator
    return losses.masked_fill(empty[:, 0], 0.0)


def masked_mean(values: Tensor, mask: Tensor, *, spread: bool = False) -> Tensor:
    """Return the mean of each row's entries under a mask, [n]; 0 for a row without entries.

    Args:
        values: [n, m].
        mask: Bool [n, m].
        spread: As for `masked_info_nce`.
    """
    total = values.masked_fill(~mask, 0.0).sum(1)
    if spread:
        total = sum_over_ranks(total)
    return total / _count(mask, spread=spread).clamp_min(1)


def _count(mask: Tensor, *, spread: bool) -> Tensor:
    """Return the number of each row's entries under a mask, [n]."""
    count = mask.sum(1)
    return sum_over_ranks(count) if spread else count


def _logsumexp(values: Tensor, *, spread: bool) -> Tensor:
    """Return the logsumexp of each row, [n]."""
    if not spread:
        return values.logsumexp(1)
    own = values.detach()
    largest = own.amax(1) if own.shape[1] else own.new_full((len(own),), -math.inf)
    largest = max_over_ranks(largest).clamp_min(torch.finfo(own.dtype).min)
    total = sum_over_ranks((values - largest[:, None]).exp().sum(1))
    return largest + total.log()


def sigmoid(logits: Tensor, positives: Tensor) -> Tensor:
    """Return each row's sum of ln(1 + exp(-z * logit)), z = +1 for a positive, else -1, [n]."""
    return F.softplus(torch.where(positives, -logits, logits)).sum(1)


def hinge(positive: Tensor, similarity: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """Return relu(margin + similarity - positive), [n, m]; 0 where `negatives` is False.

    Args:
        positive: [n], each anchor's similarity to its own pair.
        similarity: [n, m].
        negatives: Bool [n, m].
        margin: How far a negative must stay below the positive.
    """
    return F.relu(margin + similarity - positive[:, None]).masked_fill(~negatives, 0.0)


def off_diagonal(matrix: Tensor) -> Tensor:
    """Return the off-diagonal entries of square matrices [..., n, n], [..., n * (n - 1)]."""
    n = matrix.shape[-1]
    rows = matrix.flatten(-2)[..., :-1].reshape(*matrix.shape[:-2], n - 1, n + 1)
    return rows[..., 1:].flatten(-2)


def check_tile(tile: Tile) -> None:
    """Raise ValueError unless `tile` is "auto", None or an int >= 1."""
    if tile is None or tile == "auto":
        return
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ValueError(f"tile must be 'auto', None or a number of rows >= 1, got {tile!r}")


def contrast(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    positives: Positives,
    *,
    kind: str = "outside",
    decoupled: bool = False,
    label_smoothing: float = 0.0,
    symmetric: bool = False,
    batch: GlobalBatch | None = None,
    tile: Tile = "auto",
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the InfoNCE losses of all anchors against all candidates, summed, a scalar.

    Let l = scale * anchors @ candidates.T, K the candidates without the anchor itself, and P the
    positives. ``outside`` is lse_K(l) - mean_P(l), ``inside`` is lse_K(l) - lse_P(l), and ``mask``
    is lse_{K - P + own}(l) - l_own, where own is the partner: the rest of the group is dropped.

    An anchor without a positive, or without a denominator, adds exactly 0 and has no gradient.

    If the candidates *are* the anchors (the same tensor, and `positives.itself` is given), or with
    `symmetric`, one matrix product serves the rows and the columns of the logits, over several
    ranks too: a rank multiplies its anchors with all candidates.

    Args:
        anchors: [n, D], normalised, float32 or float64.
        candidates: [m, D], likewise; with `batch` this rank's piece of them, which is gathered with
            gradient.
        scale: 0-dim, 1 / temperature.
        positives: Matching candidates.
        kind: How several positives are combined: ``"outside"``, ``"inside"`` or ``"mask"``.
        decoupled: Whether positives are left out of the denominator (arXiv:2110.06848).
        label_smoothing: The share of the target spread evenly over the denominator's columns.
        symmetric: Whether this rank's candidates are anchors too, each the partner of the anchor in
            its place, with the same groups. Their losses are added.
        batch: Sizes of all ranks' candidates; None: `candidates` are all.
        tile: Rows of a tile; None: the whole matrix; ``"auto"``: tiles if the matrix is large.
        normalize: Whether to normalise the features, which may be in half precision then.
        dtype: The dtype in which the features entered; an accelerator's matrix units may multiply
            half precision as such.
    """
    others = None if candidates is anchors and positives.itself is not None else candidates
    blocks = LossBlocks(anchors, others, scale, normalize=normalize)
    rows = resolve_tile(tile, anchors, candidates, batch=batch, dtype=dtype)
    if rows is not None:
        settings = TileSettings(rows, decoupled, label_smoothing, symmetric)
        return tiled_contrast(blocks, positives, kind, settings, dtype=dtype, batch=batch)
    logits = _logits(blocks, dtype, batch)
    losses = partial(
        _row_losses, positives=positives, kind=kind, decoupled=decoupled, smoothing=label_smoothing
    )
    if not symmetric:
        return losses(logits).sum()
    if batch is None or batch.world_size == 1:
        return (losses(logits) + losses(logits.T)).sum()
    return (losses(logits) + losses(logits.T, batch=batch)).sum()


def sigmoid_contrast(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    bias: Tensor,
    positives: Positives,
    *,
    batch: GlobalBatch | None = None,
    tile: Tile = "auto",
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the pairwise sigmoid losses of all anchors and candidates, summed, a scalar.

    Args:
        anchors: [n, D], normalised.
        candidates: [m, D], normalised; with `batch` this rank's piece of them.
        scale: 0-dim, 1 / temperature.
        bias: 0-dim, added to the scaled similarities.
        positives: Matching candidates.
        batch: As for `contrast`.
        tile: As for `contrast`.
        normalize: As for `contrast`.
        dtype: As for `contrast`.
    """
    blocks = LossBlocks(anchors, candidates, scale, bias, normalize)
    rows = resolve_tile(tile, anchors, candidates, batch=batch, dtype=dtype)
    if rows is not None:
        return tiled_sigmoid_contrast(blocks, positives, rows, dtype=dtype, batch=batch)
    return sigmoid(_logits(blocks, dtype, batch), positives.matches()).sum()


def masks(positives: Positives, kind: str, *, decoupled: bool) -> tuple[Tensor, Tensor | None]:
    """Return the masks of numerator and denominator (None: all columns) for a kind of positives."""
    check_choice("positives", kind, POSITIVE_KINDS)
    matches = positives.matches()
    if kind == "mask":
        own = positives.own()
        kept = positives.others() & ~matches
        return own, kept if decoupled else kept | own
    if decoupled:
        return matches, positives.others() & ~matches
    return matches, positives.others() if positives.itself is not None else None


def _logits(blocks: LossBlocks, dtype: torch.dtype | None, batch: GlobalBatch | None) -> Tensor:
    """Return scale * anchors @ candidates.T + bias for all candidates, float32 or float64."""
    half = dtype is not None and kernels_take(blocks.anchors, dtype)
    several = batch is not None and batch.world_size > 1
    if blocks.normalize and (several or not half):  # ranks exchange gradients in float32
        blocks = _at_norm(blocks)
    anchors, _, scale, bias, normalize = blocks
    candidates = blocks.piece if batch is None else batch.gather(blocks.piece)
    logits: Tensor
    if half:
        logits = half_logits(anchors.to(dtype), candidates.to(dtype), scale, normalize=normalize)
    else:
        logits = (scale * anchors) @ candidates.T
    return logits if bias is None else logits + bias


def _at_norm(blocks: LossBlocks) -> LossBlocks:
    """Return the blocks with normalised features."""
    anchors, candidates = normalize_in_float32(blocks.anchors), blocks.candidates
    if candidates is not None:
        candidates = normalize_in_float32(candidates)
    return blocks._replace(anchors=anchors, candidates=candidates, normalize=False)


def _row_losses(
    logits: Tensor,
    positives: Positives,
    kind: str,
    *,
    decoupled: bool,
    smoothing: float,
    batch: GlobalBatch | None = None,
) -> Tensor:
    """Return the losses [n] of the rows of logits [n, m].

    With `batch` the logits are transposed, [m, n]: each rank has the columns of its own anchors,
    and the losses are those of the rank's own rows.
    """
    one_each = positives.partner is not None and not positives.grouped
    if one_each and not (decoupled or smoothing):
        return _single(logits, positives, batch)
    matches, kept = masks(positives, kind, decoupled=decoupled)
    if batch is not None:
        matches, kept = matches.T, None if kept is None else kept.T
    losses = masked_info_nce(
        logits,
        matches,
        kept,
        reduction="logsumexp" if kind == "inside" else "mean",
        label_smoothing=smoothing,
        spread=batch is not None,
    )
    return losses if batch is None else losses[batch.own]


def _single(logits: Tensor, positives: Positives, batch: GlobalBatch | None) -> Tensor:
    """Return lse - own for anchors with one positive each; only the anchor itself is masked."""
    assert positives.partner is not None
    if batch is not None:
        own = logits.gather(0, positives.partner[None])[0]
        return _logsumexp(logits, spread=True)[batch.own] - own
    if positives.itself is not None:
        logits = logits.scatter(1, positives.itself[:, None], -math.inf)
    return F.cross_entropy(logits, positives.partner, reduction="none")
