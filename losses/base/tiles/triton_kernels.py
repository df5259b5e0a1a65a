"""Triton kernels for tiles of logits on the tensor cores. `triton_blocks` launches them.

Exponents are of base 2, which the hardware computes. Nearly every tile holds only negatives; it
skips the branch that looks at each entry.

Arguments that all kernels share:
    anchors, candidates: Descriptors of a chunk's features, [height, WIDTH] and [width, WIDTH], for
        tiles of ROWS and COLUMNS in steps of STEP.
    partner, inverse, itself, row_groups, column_groups: As in `torch_blocks.Entries`; ITSELF and
        GROUP select those that are read.
    row, column, height, width: The chunk of logits that a launch computes, one tile per program.
    scale, bias, reference: 0-dim.
"""

# Triton compiles these functions; Python's checkers cannot type their arguments.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202, PLR0917
# fmt: off

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# The kind of the rest of a row's group: the kernels' argument GROUP.
NEGATIVE, NEITHER, POSITIVE = 0, 1, 2


@triton.jit
def _place(row, column, height, width, BAND, ROWS, COLUMNS):
    """Return this program's tile (down, across) and its rows and columns.

    Programs go down bands of BAND tiles, so that consecutive programs share the cache.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(width, COLUMNS)
    band = program // (BAND * tiles)
    within = program % (BAND * tiles)
    tall = tl.minimum(tl.cdiv(height, ROWS) - band * BAND, BAND)
    down, across = band * BAND + within % tall, within // tall
    rows = row + down * ROWS + tl.arange(0, ROWS)
    return down, across, rows, column + across * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _products(anchors, candidates, row, column, WIDTH, ROWS, COLUMNS, STEP):
    """Return the dot products of ROWS anchors with COLUMNS candidates; 0 beyond the edge."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, STEP):
        left, right = anchors.load([row, start]), candidates.load([column, start])
        total = tl.dot(left, right.T, total)
    return total


@triton.jit
def _meets(indices, columns):
    """Return whether the range of the indices (without negative ones) overlaps the columns'."""
    least = tl.min(tl.where(indices < 0, 2147483647, indices), 0)
    return (least <= tl.max(columns, 0)) & (tl.max(indices, 0) >= tl.min(columns, 0))


@triton.jit
def _special(rows, columns, n, m, partner, inverse, itself, ITSELF, GROUP):
    """Return whether a tile may hold entries other than negatives."""
    special = (tl.max(rows, 0) >= n) | (tl.max(columns, 0) >= m) | (GROUP != 0)
    special = special | _meets(tl.load(partner + rows, rows < n, -1), columns)
    special = special | _meets(tl.load(inverse + rows, rows < n, -1), columns)
    if ITSELF:
        special = special | _meets(tl.load(itself + rows, rows < n, -1), columns)
    return special


@triton.jit
def _entries(
    rows, columns, n, m, partner, inverse, itself, row_groups, column_groups, ITSELF, GROUP
):
    """Return the masks of the rows' positives, of the columns', and of neutral entries."""
    neither = (rows >= n)[:, None] | (columns >= m)[None, :]
    if ITSELF:
        neither = neither | (columns[None, :] == tl.load(itself + rows, rows < n, -1)[:, None])
    positive = columns[None, :] == tl.load(partner + rows, rows < n, -1)[:, None]
    answer = columns[None, :] == tl.load(inverse + rows, rows < n, -1)[:, None]
    if GROUP != 0:
        group = tl.load(row_groups + rows, rows < n, 0)
        same = group[:, None] == tl.load(column_groups + columns, columns < m, 0)[None, :]
        if GROUP == 2:
            positive = same & ~neither
            answer = positive
        else:
            neither = neither | (same & ~positive)
    return positive, answer, neither


@triton.jit
def bounded_sums(
    anchors, candidates, partner, inverse, itself, row_groups, column_groups,
    row, column, height, width, n, m, scale, reference, own, row_sums, column_sums,
    WIDTH: tl.constexpr, ITSELF: tl.constexpr, GROUP: tl.constexpr, BOTH: tl.constexpr,
    UPPER: tl.constexpr,
    BAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):
    """Sum 2**(logit - reference) over the negatives of each tile's rows and columns.

    One exponential serves both directions. row_sums: [tiles across, height]; column_sums:
    [tiles down, width]; own: [n], the logits of own pairs. With UPPER the matrix is symmetric, and
    only entries above its diagonal are summed, for their row and for their column.
    """
    down, across, rows, columns = _place(row, column, height, width, BAND, ROWS, COLUMNS)
    if (tl.max(columns, 0) <= tl.min(rows, 0)) & UPPER:
        return
    total = _products(
        anchors, candidates, down * ROWS, across * COLUMNS, WIDTH, ROWS, COLUMNS, STEP
    )
    factor, least = tl.load(scale) * LOG2_E, tl.load(reference)
    if _special(rows, columns, n, m, partner, inverse, itself, ITSELF, GROUP):
        positive, answer, neither = _entries(
            rows, columns, n, m, partner, inverse, itself, row_groups, column_groups, ITSELF, GROUP
        )
        if UPPER:
            neither = neither | (columns[None, :] <= rows[:, None])
            positive, answer = positive & ~neither, answer & ~neither
            logits = tl.sum(tl.where(answer, total, 0.0), 0) * tl.load(scale)
            tl.store(own + columns, logits, tl.max(answer.to(tl.int32), 0) != 0)
        logits = tl.sum(tl.where(positive, total, 0.0), 1) * tl.load(scale)
        tl.store(own + rows, logits, (rows < n) & (tl.max(positive.to(tl.int32), 1) != 0))
        terms = tl.where(neither, 0.0, tl.exp2(total * factor - least))
        row_sum = tl.sum(tl.where(positive, 0.0, terms), 1)
        column_sum = tl.sum(tl.where(answer, 0.0, terms), 0)
    else:
        terms = tl.exp2(total * factor - least)
        row_sum, column_sum = tl.sum(terms, 1), tl.sum(terms, 0)
    tl.store(row_sums + across * height + rows - row, row_sum, rows < row + height)
    if BOTH:
        columns_out = column_sums + down * width + columns - column
        tl.store(columns_out, column_sum, columns < column + width)


@triton.jit
def online_sums(
    anchors, candidates, partner, inverse, itself, row_groups, column_groups,
    row, column, height, width, n, m, scale, needed, maxima, totals,
    WIDTH: tl.constexpr, ITSELF: tl.constexpr, GROUP: tl.constexpr, POSITIVES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):
    """Write each row's maximum and sum of exp(logit - maximum), over its negatives or positives.

    Exact for any logits. Does nothing if `needed`, read on the device, is 0.
    """
    if tl.load(needed) == 0:
        return
    first = tl.program_id(0) * ROWS
    rows = row + first + tl.arange(0, ROWS)
    factor = tl.load(scale) * LOG2_E
    maximum = tl.full((ROWS,), -3.0e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        columns = column + start + tl.arange(0, COLUMNS)
        exponents = factor * _products(
            anchors, candidates, first, start, WIDTH, ROWS, COLUMNS, STEP
        )
        positive, _, neither = _entries(
            rows, columns, n, m, partner, inverse, itself, row_groups, column_groups, ITSELF, GROUP
        )
        counted = positive if POSITIVES else ~(positive | neither)
        exponents = tl.where(counted, exponents, float("-inf"))
        larger = tl.maximum(maximum, tl.max(exponents, 1))
        total = total * tl.exp2(maximum - larger)
        total += tl.sum(tl.exp2(exponents - larger[:, None]), 1)
        maximum = larger
    tl.store(maxima + rows, maximum / LOG2_E, rows < row + height)
    tl.store(totals + rows, total, rows < row + height)


@triton.jit
def _exact_gradient(
    exponents, statistics, indices, count, AXIS, own, pull, positive, GROUP,
):
    """Return the gradient of a tile from one direction's losses, exact for any logits.

    statistics: [5, count], of the rows (AXIS 1) or of the columns (AXIS 0) at the indices; own: the
    mask of own pairs; pull: of own pairs, by row.
    """
    statistics, inside = statistics + indices, indices < count
    normalizer = tl.expand_dims(tl.load(statistics, inside, 0.0), AXIS)
    weight = tl.expand_dims(tl.load(statistics + 4 * count, inside, 0.0), AXIS)
    values = weight * tl.exp2(exponents - normalizer)
    if GROUP == 2:
        pulls = tl.expand_dims(tl.load(statistics + count, inside, 0.0), AXIS)
        reference = tl.expand_dims(tl.load(statistics + 2 * count, inside, 0.0), AXIS)
        return tl.where(positive, -pulls * tl.exp2(exponents - reference), values)
    else:
        return tl.where(own, -pull[:, None], values)


@triton.jit
def contrast_gradient(
    anchors, candidates, partner, inverse, itself, row_groups, column_groups,
    row, column, height, width, n, m, scale, reference, exact, pull, row_terms, column_terms,
    gradient, sums,
    WIDTH: tl.constexpr, ITSELF: tl.constexpr, GROUP: tl.constexpr, BOTH: tl.constexpr,
    BAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):
    """Write the gradient of a chunk of logits, [height, width]; add that of the scale to sums.

    If the range of the logits allows (`exact` is 0), one exponential serves both directions:
    2**(logit - reference) times the sum of a row's factor and a column's. The terms, [5, n] and
    [5, m], are normalizer, pull and positive, as exponents of 2, that factor, and the weight of the
    loss, by which pull and factor are multiplied already; pull, [n], is that of the columns whose
    own pair is the row.
    """
    down, across, rows, columns = _place(row, column, height, width, BAND, ROWS, COLUMNS)
    total = _products(
        anchors, candidates, down * ROWS, across * COLUMNS, WIDTH, ROWS, COLUMNS, STEP
    )
    factor = tl.load(scale) * LOG2_E
    special = _special(rows, columns, n, m, partner, inverse, itself, ITSELF, GROUP)
    if special | (tl.load(exact) != 0):
        positive, answer, neither = _entries(
            rows, columns, n, m, partner, inverse, itself, row_groups, column_groups, ITSELF, GROUP
        )
        exponents, own = total * factor, tl.load(row_terms + n + rows, rows < n, 0.0)
        values = _exact_gradient(
            exponents, row_terms, rows, n, 1, positive, own, positive, GROUP
        )
        if BOTH:
            own = tl.load(pull + rows, rows < n, 0.0)
            values += _exact_gradient(
                exponents, column_terms, columns, m, 0, answer, own, positive, GROUP
            )
        values = tl.where(neither, 0.0, values)
        scale_sum = tl.sum(tl.sum(values * total, 1), 0)
    else:
        weights = tl.load(row_terms + 3 * n + rows)[:, None]
        if BOTH:
            weights = weights + tl.load(column_terms + 3 * m + columns)[None, :]
        values = tl.exp2(total * factor - tl.load(reference)) * weights
        scale_sum = tl.sum(tl.sum(values * total, 1), 0)
    _add(sums, scale_sum)
    gradient.store([down * ROWS, across * COLUMNS], values.to(tl.bfloat16))


@triton.jit
def _add(sums, value):
    """Add a value to this program's slot."""
    slot = sums + tl.program_id(0)
    tl.store(slot, tl.load(slot) + value)


@triton.jit
def normalize_features(features, normalized, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write one row [SIZE] per program, divided by its norm; 0 for a row without a direction."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    values = tl.load(features + row * SIZE + places, places < SIZE, 0.0).to(tl.float32)
    inverse = _inverse_norm(values)
    values = (values * inverse).to(normalized.dtype.element_ty)
    tl.store(normalized + row * SIZE + places, values, places < SIZE)


@triton.jit
def feature_gradients(
    totals, features, factor, gradients,
    NORMALIZE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write factor times a row of totals, and undo the normalisation of its feature if NORMALIZE.

    The component along the feature does not change its direction and is removed.
    """
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    total = tl.load(totals + row * SIZE + places, places < SIZE, 0.0) * tl.load(factor)
    if NORMALIZE:
        feature = tl.load(features + row * SIZE + places, places < SIZE, 0.0).to(tl.float32)
        inverse = _inverse_norm(feature)
        feature = feature * inverse
        total = (total - tl.sum(total * feature, 0) * feature) * inverse
    tl.store(
        gradients + row * SIZE + places, total.to(gradients.dtype.element_ty), places < SIZE
    )


@triton.jit
def _inverse_norm(values):
    """Return 1 / norm, or 0 if the norm is too small to have a direction."""
    norm = tl.sqrt(tl.sum(values * values, 0))
    return tl.where(norm <= 1e-12, 0.0, 1.0 / norm)


@triton.jit
def _softplus(values):
    """Return log(1 + exp(value)) with a relative error of 4e-7: there are many small values."""
    small = tl.exp2(-(tl.abs(values) * LOG2_E))
    # log(1 + x) / x on [0, 1], interpolated at Chebyshev points. A logarithm of 1 + x would lose a
    # small x and takes longer.
    ratio = 0.0434938998 - 0.00837115255 * small
    ratio = ratio * small - 0.106850029
    ratio = ratio * small + 0.176874767
    ratio = ratio * small - 0.244747742
    ratio = ratio * small + 0.332719284
    ratio = ratio * small - 0.499971745
    ratio = ratio * small + 0.999999781
    return tl.maximum(values, 0.0) + ratio * small


@triton.jit
def sigmoid_losses(
    anchors, candidates, partner, inverse, itself, row_groups, column_groups,
    row, column, height, width, n, m, scale, bias, sums,
    WIDTH: tl.constexpr, ITSELF: tl.constexpr, GROUP: tl.constexpr,
    BAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):
    """Add the sum of each tile's losses to sums."""
    down, across, rows, columns = _place(row, column, height, width, BAND, ROWS, COLUMNS)
    total = _products(
        anchors, candidates, down * ROWS, across * COLUMNS, WIDTH, ROWS, COLUMNS, STEP
    )
    logits = total * tl.load(scale) + tl.load(bias)
    if _special(rows, columns, n, m, partner, inverse, itself, ITSELF, GROUP):
        positive, _, _ = _entries(
            rows, columns, n, m, partner, inverse, itself, row_groups, column_groups, ITSELF, GROUP
        )
        values = _softplus(tl.where(positive, -logits, logits))
        values = tl.where((rows < n)[:, None] & (columns < m)[None, :], values, 0.0)
        loss = tl.sum(tl.sum(values, 1), 0)
    else:
        loss = tl.sum(tl.sum(_softplus(logits), 1), 0)
    _add(sums, loss)


@triton.jit
def sigmoid_gradient(
    anchors, candidates, partner, inverse, itself, row_groups, column_groups,
    row, column, height, width, n, m, scale, bias, weight, gradient, sums, slots,
    WIDTH: tl.constexpr, ITSELF: tl.constexpr, GROUP: tl.constexpr,
    BAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):
    """Write the gradient of a chunk of logits; add those of scale and bias to sums [2, slots].

    weight: 0-dim, of the loss.
    """
    down, across, rows, columns = _place(row, column, height, width, BAND, ROWS, COLUMNS)
    total = _products(
        anchors, candidates, down * ROWS, across * COLUMNS, WIDTH, ROWS, COLUMNS, STEP
    )
    logits = total * tl.load(scale) + tl.load(bias)
    if _special(rows, columns, n, m, partner, inverse, itself, ITSELF, GROUP):
        positive, _, _ = _entries(
            rows, columns, n, m, partner, inverse, itself, row_groups, column_groups, ITSELF, GROUP
        )
        values = tl.where(positive, -tl.sigmoid(-logits), tl.sigmoid(logits)) * tl.load(weight)
        values = tl.where((rows < n)[:, None] & (columns < m)[None, :], values, 0.0)
        scale_sum, bias_sum = tl.sum(tl.sum(values * total, 1), 0), tl.sum(tl.sum(values, 1), 0)
    else:
        values = tl.sigmoid(logits) * tl.load(weight)
        scale_sum, bias_sum = tl.sum(tl.sum(values * total, 1), 0), tl.sum(tl.sum(values, 1), 0)
    _add(sums, scale_sum)
    _add(sums + slots, bias_sum)
    gradient.store([down * ROWS, across * COLUMNS], values.to(tl.bfloat16))
