"""Objectives: pure functions from logits, or from features, to losses.

`masked_info_nce`, `sigmoid`, `hinge` and `off_diagonal` take a matrix. `contrast` and
`sigmoid_contrast` take features and a `tile`: starting from features, a loss need not hold the
matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

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

    Returns:
        [n]; exactly 0, with zero gradient, for a row without a positive or without a kept column.
    """
    # An empty row is computed on all its columns and set to 0 at the end. Masking it to -inf first
    # would leave a NaN in the gradient that no later `where` removes.
    empty = ~positives.any(1, keepdim=True)
    if kept is not None:
        empty = empty | ~kept.any(1, keepdim=True)
    denominator = logits if log_weights is None else logits + log_weights
    if kept is not None:
        denominator = denominator.masked_fill(~(kept | empty), -math.inf)
    if reduction == "mean":
        numerator = masked_mean(logits, positives)
    else:
        numerator = logits.masked_fill(~(positives | empty), -math.inf).logsumexp(1)
    if label_smoothing:
        spread = logits.mean(1) if kept is None else masked_mean(logits, kept)
        numerator = (1 - label_smoothing) * numerator + label_smoothing * spread
    return (denominator.logsumexp(1) - numerator).masked_fill(empty[:, 0], 0.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each row's entries under a mask, [n]; 0 for a row without entries."""
    return values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp_min(1)


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
    tile: Tile = "auto",
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the InfoNCE losses of all anchors against all candidates, summed, a scalar.

    Let l = scale * anchors @ candidates.T, K the candidates without the anchor itself, and P the
    positives. ``outside`` is lse_K(l) - mean_P(l), ``inside`` is lse_K(l) - lse_P(l), and ``mask``
    is lse_{K - P + own}(l) - l_own, where own is the partner: the rest of the group is dropped.

    An anchor without a positive, or without a denominator, adds exactly 0 and has no gradient.

    Args:
        anchors: [n, D], normalised, float32 or float64.
        candidates: [m, D], likewise.
        scale: 0-dim, 1 / temperature.
        positives: Matching candidates.
        kind: How several positives are combined: ``"outside"``, ``"inside"`` or ``"mask"``.
        decoupled: Whether positives are left out of the denominator (arXiv:2110.06848).
        label_smoothing: The share of the target spread evenly over the denominator's columns.
        symmetric: Whether the candidates are anchors too (n = m, the same partners and groups in
            both directions). Their losses are added; the matrix product is shared.
        tile: Rows of a tile; None: the whole matrix; ``"auto"``: tiles if the matrix is large.
        normalize: Whether to normalise the features, which may be in half precision then.
        dtype: The dtype in which the features entered; an accelerator's matrix units may multiply
            half precision as such.
    """
    blocks = LossBlocks(anchors, candidates, scale, normalize=normalize)
    rows = resolve_tile(tile, anchors, candidates)
    if rows is not None:
        settings = TileSettings(rows, decoupled, label_smoothing, symmetric)
        return tiled_contrast(blocks, positives, kind, settings, dtype)
    logits = _logits(blocks, dtype)
    row_losses = _row_losses(positives, kind, decoupled=decoupled, label_smoothing=label_smoothing)
    losses = row_losses(logits)
    return (losses + row_losses(logits.T) if symmetric else losses).sum()


def sigmoid_contrast(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    bias: Tensor,
    positives: Positives,
    *,
    tile: Tile = "auto",
    normalize: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the pairwise sigmoid losses of all anchors and candidates, summed, a scalar.

    Args:
        anchors: [n, D], normalised.
        candidates: [m, D], normalised.
        scale: 0-dim, 1 / temperature.
        bias: 0-dim, added to the scaled similarities.
        positives: Matching candidates.
        tile: As for `contrast`.
        normalize: As for `contrast`.
        dtype: As for `contrast`.
    """
    blocks = LossBlocks(anchors, candidates, scale, bias, normalize)
    rows = resolve_tile(tile, anchors, candidates)
    if rows is not None:
        return tiled_sigmoid_contrast(blocks, positives, rows, dtype)
    return sigmoid(_logits(blocks, dtype), positives.matches()).sum()


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


def _logits(blocks: LossBlocks, dtype: torch.dtype | None) -> Tensor:
    """Return scale * anchors @ candidates.T + bias, float32 or float64."""
    anchors, candidates, scale, bias, normalize = blocks
    logits: Tensor
    if dtype is not None and kernels_take(anchors, dtype):
        logits = half_logits(anchors.to(dtype), candidates.to(dtype), scale, normalize)
    else:
        if normalize:
            anchors, candidates = normalize_in_float32(anchors), normalize_in_float32(candidates)
        logits = (scale * anchors) @ candidates.T
    return logits if bias is None else logits + bias


def _row_losses(
    positives: Positives, kind: str, *, decoupled: bool, label_smoothing: float
) -> Callable[[Tensor], Tensor]:
    """Return the function from logits [n, m] to the losses of their rows [n]."""
    one_each = positives.partner is not None and not positives.grouped
    if one_each and not (decoupled or label_smoothing):
        return partial(_single, positives=positives)
    matches, kept = masks(positives, kind, decoupled=decoupled)
    return partial(
        masked_info_nce,
        positives=matches,
        kept=kept,
        reduction="logsumexp" if kind == "inside" else "mean",
        label_smoothing=label_smoothing,
    )


def _single(logits: Tensor, positives: Positives) -> Tensor:
    """Return lse - own for anchors with one positive each; only the anchor itself is masked."""
    assert positives.partner is not None
    if positives.itself is not None:
        logits = logits.scatter(1, positives.itself[:, None], -math.inf)
    return F.cross_entropy(logits, positives.partner, reduction="none")
