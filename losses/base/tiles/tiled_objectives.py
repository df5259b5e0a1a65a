"""Tiled objectives: `contrast` and `sigmoid_contrast` in memory linear in the batch.

They equal the objectives of `diptych.losses.base.objectives` in value and gradient. They hold one
block of the n x m logits at a time. `contrast` needs the sums of whole lines before it can compute
a gradient, so its backward computes the blocks again; `sigmoid_contrast` does not, and computes
both from one block. Both are custom operators, which `torch.compile` keeps whole and which are
differentiable once.

Two parts of a loss are linear in the logits: the mean over a group's positives, and label
smoothing. They equal an anchor times a mean of candidates and are added outside the blocks, which
see one positive for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.gather import GlobalBatch
from diptych.losses.base.normalization import normalize_in_float32
from diptych.losses.base.positives import Positives
from diptych.losses.base.tiles import operators
from diptych.losses.base.tiles.operators import TiledLossArguments, kernels_take
from diptych.losses.base.tiles.torch_blocks import Entries, LossBlocks, TileSettings
from diptych.losses.base.validation import working_dtype

_PLAIN_LOGITS = {"cpu": 2**24, "cuda": 2**26}
_PLAIN_COLUMNS_BESIDE_KERNELS = 512
_BLOCK_LOGITS = {"cpu": 2**22, "cuda": 3 * 2**24}
_LEAST_ROWS = {"cpu": 32, "cuda": 512}
_ALL = GlobalBatch((0,), 0)
"""The batch of one process, or of one rank that has all candidates: nothing is gathered."""


def resolve_tile(
    tile: int | str | None,
    anchors: Tensor,
    candidates: Tensor,
    *,
    batch: GlobalBatch | None = None,
    dtype: torch.dtype | None = None,
) -> int | None:
    """Return the number of rows of a block, or None for the whole matrix.

    ``"auto"`` means the whole matrix up to 8192 x 8192 logits on an accelerator and 4096 x 4096 on
    a CPU, where memory is no concern. Above that, blocks have 48 Mi and 4 Mi logits, and at least
    512 and 32 rows. Where the half-precision kernels run, they take more than 512 candidates, up to
    8192 x 8192 logits in one block.

    Args:
        tile: ``"auto"``, None (whole) or a number of rows.
        anchors: [n, D].
        candidates: [m, D], or this rank's piece of them.
        batch: Sizes of all ranks' candidates; None: `candidates` are all. The ranks choose alike,
            by the largest piece.
        dtype: The dtype in which the features entered.
    """
    if not isinstance(tile, str):
        return tile
    kind = "cpu" if anchors.device.type == "cpu" else "cuda"
    rows, columns = anchors.shape[0], candidates.shape[0]
    if batch is not None:
        rows, columns = max(batch.sizes), batch.total
    if rows * columns <= _PLAIN_LOGITS[kind]:
        # By the global batch, so that another number of ranks does not change the arithmetic.
        beside_kernels = columns > _PLAIN_COLUMNS_BESIDE_KERNELS
        return rows if beside_kernels and kernels_take(anchors, dtype) else None
    return max(_LEAST_ROWS[kind], _BLOCK_LOGITS[kind] // columns)


def tiled_contrast(
    blocks: LossBlocks,
    positives: Positives,
    kind: str,
    settings: TileSettings,
    *,
    dtype: torch.dtype | None = None,
    batch: GlobalBatch | None = None,
) -> Tensor:
    """Return the InfoNCE losses of all anchors, summed, a scalar: the same as `contrast`.

    Args:
        blocks: The factors of the logits [n, m].
        positives: Matching candidates.
        kind: ``"outside"``, ``"inside"`` or ``"mask"``.
        settings: Rows of a block, and the options of `contrast`.
        dtype: The dtype in which the features entered. On a GPU with Triton, bfloat16 and float16
            are multiplied as such and summed in float32; elsewhere blocks are float32 or float64.
        batch: Sizes of all ranks' candidates; None: those of `blocks` are all.
    """
    batch = _ALL if batch is None else batch
    decoupled, smoothing = settings.decoupled, settings.smoothing
    adds_linear = smoothing > 0 or (positives.grouped and kind == "outside")
    blocks = _prepared(blocks, dtype, late=not adds_linear)
    positives, inverse = _with_partner(positives)
    valid = _valid(positives, decoupled=decoupled)
    entries = _entries(positives, kind, decoupled=decoupled)
    entries = entries._replace(inverse=inverse, valid=valid)
    loss = operators.contrast(TiledLossArguments(blocks, entries, settings, batch))
    if not adds_linear:
        return loss
    anchors, piece, scale = blocks.anchors, blocks.piece, blocks.scale
    directions = (anchors, piece), (piece, anchors)
    for own, others in directions[: 1 + settings.symmetric]:
        whole = batch.gather(others.to(scale.dtype))
        point = _linear_part(whole, positives, kind, decoupled=decoupled, smoothing=smoothing)
        linear = (own.to(scale.dtype) * point).sum(1)
        linear = linear if valid is None else linear.masked_fill(~valid, 0.0)
        loss = loss + scale * linear.sum()
    return loss


def tiled_sigmoid_contrast(
    blocks: LossBlocks,
    positives: Positives,
    rows: int,
    *,
    dtype: torch.dtype | None = None,
    batch: GlobalBatch | None = None,
) -> Tensor:
    """Return the sigmoid losses of all pairs, summed, a scalar: the same as `sigmoid_contrast`.

    Args:
        blocks: The factors of the logits [n, m].
        positives: Matching candidates.
        rows: Rows of a block, >= 1.
        dtype: As for `tiled_contrast`.
        batch: As for `tiled_contrast`.
    """
    blocks, entries = _prepared(blocks, dtype), _entries(_with_partner(positives)[0])
    batch = _ALL if batch is None else batch
    settings = TileSettings(rows, gradient=torch.is_grad_enabled())
    return operators.sigmoid_contrast(TiledLossArguments(blocks, entries, settings, batch))


def _prepared(blocks: LossBlocks, dtype: torch.dtype | None, *, late: bool = True) -> LossBlocks:
    """Return the factors of the logits as the blocks take them.

    Args:
        blocks: The factors as the objective got them.
        dtype: The dtype in which the features entered.
        late: Whether the Triton kernels, if they run, may normalise.
    """
    anchors, candidates, scale, bias, normalize = blocks
    half = kernels_take(anchors, dtype)

    def prepared(features: Tensor) -> Tensor:
        if normalize and not (half and late):
            features = normalize_in_float32(features)
        return features.to(dtype) if half else features

    anchors = prepared(anchors)
    candidates = None if candidates is None else prepared(candidates)
    working = working_dtype(anchors)
    bias = None if bias is None else bias.to(working)
    return LossBlocks(anchors, candidates, scale.to(working), bias, normalize and half and late)


def _with_partner(positives: Positives) -> tuple[Positives, Tensor | None]:
    """Return positives in which every anchor has a partner, and the inverse of the partners.

    If groups alone decide, the partner is another member of the anchor's group, so that the
    positive subtracted inside the blocks comes from the same matrix product as the negatives. An
    anchor without other members gets an arbitrary column; it is not valid. If the anchors are among
    the candidates, partners go round the group: each anchor is the partner of one other, of which
    the inverse is the column. It is None if every anchor is the partner of its partner.
    """
    if positives.partner is not None:
        return positives, None
    assert positives.row_groups is not None, "Positives needs a partner or groups"
    assert positives.column_groups is not None
    ordered, order = positives.column_groups.sort(stable=True)
    last = positives.candidates - 1
    rows = positives.row_groups.contiguous()
    start = torch.searchsorted(ordered, rows)
    if positives.itself is None:
        return positives._replace(partner=order[start.clamp(max=last)]), None
    count = torch.searchsorted(ordered, rows, right=True) - start
    places = torch.empty_like(order).scatter_(0, order, torch.arange(last + 1, device=order.device))
    place = places[positives.itself] - start
    following, before = (order[start + (place + step) % count] for step in (1, -1))
    return positives._replace(partner=following), before


def _entries(positives: Positives, kind: str = "inside", *, decoupled: bool = False) -> Entries:
    """Return the kind of each logit, for positives in which every anchor has a partner."""
    assert positives.partner is not None
    entries = Entries(positives.partner, itself=positives.itself)
    if not positives.grouped or (kind == "outside" and not decoupled):
        return entries
    return entries._replace(
        row_groups=positives.row_groups,
        column_groups=positives.column_groups,
        group_matches=kind == "inside",
    )


def _valid(positives: Positives, *, decoupled: bool) -> Tensor | None:
    """Return which anchors have a positive and a denominator, bool [n]; None: all."""
    if not positives.grouped and not decoupled:
        return None
    counts = positives.counts()
    valid = counts > 0
    if decoupled:
        valid = valid & (counts < positives.candidates - (positives.itself is not None))
    return valid


def _linear_part(
    candidates: Tensor,
    positives: Positives,
    kind: str,
    *,
    decoupled: bool,
    smoothing: float,
) -> Tensor:
    """Return the point c [n, D]: an anchor's loss is that of the blocks plus scale * anchor . c.

    The blocks subtract (1 - smoothing) times the partner's logit. ``outside`` needs the mean over
    all positives instead, and smoothing needs the mean over the denominator.
    """
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
    # The first position of an id among the sorted ids numbers its group without a synchronisation.
    columns = torch.searchsorted(ordered, positives.column_groups.contiguous())
    rows = torch.searchsorted(ordered, positives.row_groups.contiguous())
    sums = torch.zeros_like(candidates).index_add(0, columns, candidates)
    return sums[rows.clamp(max=positives.candidates - 1)]
