"""Triton kernels for tiles of logits on the tensor cores. `triton_blocks` launches them.

Exponents are of base 2, which the hardware computes. Nearly every tile holds only negatives; it
skips the branch that looks at each entry.

Arguments that all kernels share:
    anchors, candidates: Descriptors of a chunk's features, [height, WIDTH] and [width, WIDTH], for
        tiles of ROWS and COLUMNS in steps of STEP.
    description: From `describe_rows`, int32: the partner, inverse and itself of each row, as in
        `torch_blocks.Entries`, their range in each tile's rows, and the exponent of 2 to which all
        sums are relative, the reference.
    row_groups, column_groups: As in `Entries`; ITSELF and GROUP select what is read.
    row, column, height, width: The chunk of logits that a launch computes, one tile per program.
    scale, bias: 0-dim.

Lines are the n rows, and after them columns, if those have losses too. A program that has a block
of lines has rows or columns alone.
"""

# Triton compiles these functions; Python's checkers cannot type their arguments.
# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202, ARG001, PLR0917
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
def _lines(n, count, ROWS):
    """Return this program's block, its lines, whether they are its, and whether they are rows."""
    block = tl.program_id(0)
    own = block < tl.cdiv(n, ROWS)
    first = tl.where(own, block * ROWS, n + (block - tl.cdiv(n, ROWS)) * ROWS)
    lines = first + tl.arange(0, ROWS)
    return block, lines, lines < tl.where(own, n, count), own


@triton.jit
def describe_rows(
    partner, inverse, itself, description, scale, bound, n,
    ITSELF: tl.constexpr, BOUNDED: tl.constexpr, HEADROOM: tl.constexpr, ROWS: tl.constexpr,
):
    """Write the description, [4 + 3 n + 6 tiles]: the reference, indices [3, n], ranges [tiles, 6].

    Negative indices are no columns and are left out of the ranges. The first program writes the
    reference: a bound on the logits as exponents of 2, less HEADROOM. bound: on the products of
    features, 1 unless BOUNDED.
    """
    tile = tl.program_id(0)
    if tile == 0:
        largest = tl.abs(tl.load(scale)) * LOG2_E
        if BOUNDED:
            largest *= tl.load(bound)
        tl.store(description, (largest - HEADROOM).to(tl.int32, bitcast=True))
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    indices, bounds = _indices(description, 0, n), _bounds(description, tile, n)
    _describe(tl.load(partner + rows, inside, -1), rows, inside, indices, bounds)
    _describe(tl.load(inverse + rows, inside, -1), rows, inside, indices + n, bounds + 2)
    if ITSELF:
        _describe(tl.load(itself + rows, inside, -1), rows, inside, indices + 2 * n, bounds + 4)


@triton.jit
def _describe(columns, rows, inside, indices, bounds):
    columns = columns.to(tl.int32)
    tl.store(indices + rows, columns, inside)
    tl.store(bounds, tl.min(tl.where(columns < 0, 2147483647, columns), 0))
    tl.store(bounds + 1, tl.max(columns, 0))


@triton.jit
def _reference(description):
    return tl.load(description).to(tl.float32, bitcast=True)


@triton.jit
def _indices(description, kind, n):
    """Return the place of the rows' partner (kind 0), inverse (1) or itself (2)."""
    return description + 4 + kind * n


@triton.jit
def _bounds(description, tile, n):
    """Return the place of the least and the largest index of a tile's rows, for each kind."""
    return description + 4 + 3 * n + 6 * tile


@triton.jit
def _products(anchors, candidates, row, column, WIDTH, ROWS, COLUMNS, STEP):
    """Return the dot products of ROWS anchors with COLUMNS candidates; 0 beyond the edge."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, STEP):
        left, right = anchors.load([row, start]), candidates.load([column, start])
        total = tl.dot(left, right.T, total)
    return total


@triton.jit
def _special(row, column, n, m, description, ITSELF, GROUP, ROWS, COLUMNS):
    """Return whether the tile at a row and column may hold entries other than negatives."""
    special = (row + ROWS > n) | (column + COLUMNS > m) | (GROUP != 0)
    bounds = _bounds(description, row // ROWS, n)
    last = column + COLUMNS - 1
    special = special | ((tl.load(bounds) <= last) & (tl.load(bounds + 1) >= column))
    special = special | ((tl.load(bounds + 2) <= last) & (tl.load(bounds + 3) >= column))
    if ITSELF:
        special = special | ((tl.load(bounds + 4) <= last) & (tl.load(bounds + 5) >= column))
    return special


@triton.jit
def _is(kind, rows, columns, n, description):
    """Return the mask of the entries whose column is the row's partner, inverse or itself."""
    chosen = tl.load(_indices(description, kind, n) + rows, rows < n, -1)
    return columns[None, :] == chosen[:, None]


@triton.jit
def _entries(rows, columns, n, m, description, row_groups, column_groups, ITSELF, GROUP):
    """Return the masks of the rows' positives, of the columns', and of neutral entries."""
    neither = (rows >= n)[:, None] | (columns >= m)[None, :]
    if ITSELF:
        neither = neither | _is(2, rows, columns, n, description)
    positive = _is(0, rows, columns, n, description)
    answer = _is(1, rows, columns, n, description)
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
    anchors, candidates, description, row_groups, column_groups,
    row, column, height, width, n, m, scale, own, row_sums, column_sums,
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
    special = _special(
        row + down * ROWS, column + across * COLUMNS, n, m, description, ITSELF, GROUP, ROWS,
        COLUMNS,
    )
    total = _products(
        anchors, candidates, down * ROWS, across * COLUMNS, WIDTH, ROWS, COLUMNS, STEP
    )
    factor, least = tl.load(scale) * LOG2_E, _reference(description)
    if special:
        positive, answer, neither = _entries(
            rows, columns, n, m, description, row_groups, column_groups, ITSELF, GROUP
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
    anchors, candidates, description, row_groups, column_groups,
    row, column, height, width, n, m, scale, maxima, totals, count,
    WIDTH: tl.constexpr, ITSELF: tl.constexpr, GROUP: tl.constexpr,
    POSITIVES: tl.constexpr, LEAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):
    """Write the maximum and the sum of exp(logit - maximum) of each line.

    The sums are over the negatives, or over the positives, and exact for any logits. totals holds
    the sums of negatives relative to the reference; they are kept if none of a block's is below
    LEAST, where terms may be lost.
    """
    _, lines, inside, own = _lines(n, count, ROWS)
    known = tl.min(tl.load(totals + lines, inside, float("inf")), 0)
    if (known >= LEAST) & (POSITIVES == 0):
        maximum = tl.zeros((ROWS,), tl.float32) + _reference(description) / LOG2_E
        tl.store(maxima + lines, maximum, inside)
    elif own:
        _sum_lines(
            anchors, candidates, description, row_groups, column_groups, n, m, scale, maxima,
            totals, lines, inside, 1, WIDTH, ITSELF, GROUP, POSITIVES, ROWS, COLUMNS, STEP,
        )
    else:
        _sum_lines(
            anchors, candidates, description, row_groups, column_groups, n, m, scale, maxima,
            totals, lines, inside, 0, WIDTH, ITSELF, GROUP, POSITIVES, ROWS, COLUMNS, STEP,
        )


@triton.jit
def _sum_lines(
    anchors, candidates, description, row_groups, column_groups, n, m, scale, maxima, totals, lines,
    inside, AXIS: tl.constexpr, WIDTH, ITSELF, GROUP, POSITIVES, ROWS, COLUMNS, STEP,
):
    """Write the exact sums of lines: rows, summed along axis 1, or columns, along axis 0."""
    factor = tl.load(scale) * LOG2_E
    maximum = tl.full((ROWS,), -3.0e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    own = lines if AXIS == 1 else lines - n
    first = tl.min(own, 0)
    for start in range(0, m if AXIS == 1 else n, COLUMNS):
        others = start + tl.arange(0, COLUMNS)
        if AXIS == 1:
            products = _products(anchors, candidates, first, start, WIDTH, ROWS, COLUMNS, STEP)
            counted, _, neither = _entries(
                own, others, n, m, description, row_groups, column_groups, ITSELF, GROUP
            )
        else:
            products = _products(anchors, candidates, start, first, WIDTH, COLUMNS, ROWS, STEP)
            _, counted, neither = _entries(
                others, own, n, m, description, row_groups, column_groups, ITSELF, GROUP
            )
        if not POSITIVES:
            counted = ~(counted | neither)
        exponents = tl.where(counted, factor * products, float("-inf"))
        larger = tl.maximum(maximum, tl.max(exponents, AXIS))
        total = total * tl.exp2(maximum - larger)
        total += tl.sum(tl.exp2(exponents - tl.expand_dims(larger, AXIS)), AXIS)
        maximum = larger
    tl.store(maxima + lines, maximum / LOG2_E, inside)
    tl.store(totals + lines, total, inside)


@triton.jit
def _exact_gradient(
    exponents, terms, count, indices, inside, AXIS, own, pull, positive, GROUP,
):
    """Return the gradient of a tile from one direction's losses, exact for any logits.

    terms: [5, count], of the rows (AXIS 1) or of the columns (AXIS 0) at the indices; own: the mask
    of own pairs; pull: of own pairs, by row.
    """
    terms += indices
    normalizer = tl.expand_dims(tl.load(terms, inside, 0.0), AXIS)
    weight = tl.expand_dims(tl.load(terms + 4 * count, inside, 0.0), AXIS)
    values = weight * tl.exp2(exponents - normalizer)
    if GROUP == 2:
        pulls = tl.expand_dims(tl.load(terms + count, inside, 0.0), AXIS)
        reference = tl.expand_dims(tl.load(terms + 2 * count, inside, 0.0), AXIS)
        return tl.where(positive, -pulls * tl.exp2(exponents - reference), values)
    else:
        return tl.where(own, -pull[:, None], values)


@triton.jit
def _exact_gradients(
    exponents, rows, columns, n, m, description, row_terms, column_terms, count, positive, answer,
    GROUP, BOTH,
):
    """Return the gradient of a tile from the losses of its rows and, if BOTH, of its columns."""
    pull = tl.load(row_terms + count + rows, rows < n, 0.0)
    values = _exact_gradient(
        exponents, row_terms, count, rows, rows < n, 1, positive, pull, positive, GROUP
    )
    if BOTH:
        answering = tl.load(_indices(description, 1, n) + rows, rows < n, 0)
        pull = tl.load(column_terms + count + answering, rows < n, 0.0)
        values += _exact_gradient(
            exponents, column_terms, count, columns, columns < m, 0, answer, pull, positive, GROUP
        )
    return values


@triton.jit
def contrast_gradient(
    anchors, candidates, description, row_groups, column_groups,
    row, column, height, width, n, m, scale, row_terms, column_terms, count, row_exact,
    column_exact, gradient, sums,
    WIDTH: tl.constexpr, ITSELF: tl.constexpr, GROUP: tl.constexpr, BOTH: tl.constexpr,
    BAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):
    """Write the gradient of a chunk of logits, [height, width]; add that of the scale to sums.

    If the range of the logits allows (a tile's row_exact and column_exact are 0), one exponential
    serves both directions: 2**(logit - reference) times the sum of a row's factor and a column's.
    The terms are those of `gradient_terms`, [5, count], from the first row and column on.
    """
    down, across, rows, columns = _place(row, column, height, width, BAND, ROWS, COLUMNS)
    special = _special(
        row + down * ROWS, column + across * COLUMNS, n, m, description, ITSELF, GROUP, ROWS,
        COLUMNS,
    )
    total = _products(
        anchors, candidates, down * ROWS, across * COLUMNS, WIDTH, ROWS, COLUMNS, STEP
    )
    factor = tl.load(scale) * LOG2_E
    exact = tl.load(row_exact + row // ROWS + down)
    if BOTH:
        exact = exact | tl.load(column_exact + column // COLUMNS + across)
    if special | (exact != 0):
        positive, answer, neither = _entries(
            rows, columns, n, m, description, row_groups, column_groups, ITSELF, GROUP
        )
        values = _exact_gradients(
            total * factor, rows, columns, n, m, description, row_terms, column_terms, count,
            positive, answer, GROUP, BOTH,
        )
        values = tl.where(neither, 0.0, values)
        scale_sum = tl.sum(values * total)
    else:
        weights = tl.load(row_terms + 3 * count + rows)[:, None]
        if BOTH:
            weights = weights + tl.load(column_terms + 3 * count + columns)[None, :]
        values = tl.exp2(total * factor - _reference(description)) * weights
        scale_sum = tl.sum(values * total)
    _add(sums, scale_sum)
    gradient.store([down * ROWS, across * COLUMNS], values.to(tl.bfloat16))


@triton.jit
def gradient_terms(
    statistics, stride, weights, description, terms, exact, n, count,
    WEIGHTED: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
):
    """Write what `contrast_gradient` reads of lines, [5, count], from their statistics [count, 3].

    These are normalizer, pull and positive, as exponents of 2, the factor 2**(reference -
    normalizer), and the weight of the loss, by which pull and factor are multiplied. weights:
    [count] if WEIGHTED, else 0-dim. Lines, and weights if WEIGHTED, are `stride` numbers apart.
    exact: for each block, whether a factor leaves float32's range.
    """
    block, lines, inside, _ = _lines(n, count, ROWS)
    places = statistics + lines * stride
    normalizer = tl.load(places, inside, float("inf")) * LOG2_E
    pull = tl.load(places + 1, inside, 0.0)
    positive = tl.load(places + 2, inside, 0.0) * LOG2_E
    weight = tl.load(weights + lines * stride, inside, 0.0) if WEIGHTED else tl.load(weights)
    least = _reference(description)
    tl.store(exact + block, (tl.min(normalizer, 0) < least - DEPTH).to(tl.int32))
    terms += lines
    tl.store(terms, normalizer, inside)
    tl.store(terms + count, weight * pull, inside)
    tl.store(terms + 2 * count, positive, inside)
    tl.store(terms + 3 * count, weight * tl.exp2(least - normalizer), inside)
    tl.store(terms + 4 * count, weight + tl.zeros_like(pull), inside)


@triton.jit
def _over_parts(maxima, totals, parts, stride, inside):
    """Return the maximum and total of logsumexps of which each part has some of the terms."""
    maximum = tl.load(maxima, inside, 0.0)
    for part in range(1, parts):
        maximum = tl.maximum(maximum, tl.load(maxima + part * stride, inside, 0.0))
    total = tl.zeros_like(maximum)
    for part in range(parts):
        terms = tl.load(totals + part * stride, inside, 1.0)
        total += terms * tl.exp(tl.load(maxima + part * stride, inside, 0.0) - maximum)
    return maximum, total


@triton.jit
def _loss_and_pull(gap, DECOUPLED):
    """Return the loss of a gap between negatives and positives, and its derivative."""
    if DECOUPLED:
        return gap, tl.zeros_like(gap) + 1.0
    else:
        return _softplus(gap), 1.0 / (1.0 + tl.exp(-gap))


@triton.jit
def losses(
    negative_maxima, negative_totals, positive_maxima, positive_totals, columns, parts, part_stride,
    kind_stride, valid, statistics, sums, n, count, smoothing,
    POSITIVES: tl.constexpr, COMPLETED: tl.constexpr, VALID: tl.constexpr, DECOUPLED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write statistics [count, 3] and sums of losses, as `torch_blocks.losses_of_sums`.

    Without POSITIVES each row has one positive, which its column shares, without VALID every line
    has a loss. COMPLETED: sums of columns are in `columns`, not with those of the rows.
    """
    block, lines, inside, own = _lines(n, count, ROWS)
    rows = tl.where(own, lines, lines - n)
    counted = inside
    if VALID:
        counted = tl.load(valid + rows, inside, 0) != 0
    known = inside & (lines < n) if COMPLETED else inside
    negative = tl.load(negative_maxima + lines, known, 0.0)
    negative_total = tl.load(negative_totals + lines, known, 1.0)
    if POSITIVES:
        positive = tl.load(positive_maxima + lines, known, 0.0)
        positive_total = tl.load(positive_totals + lines, known, 1.0)
    else:
        positive = tl.load(positive_maxima + rows, inside, 0.0)
    if COMPLETED:
        places = columns + rows
        if block >= tl.cdiv(n, ROWS):
            negative, negative_total = _over_parts(
                places, places + kind_stride, parts, part_stride, inside
            )
            if POSITIVES:
                positive, positive_total = _over_parts(
                    places + 2 * kind_stride, places + 3 * kind_stride, parts, part_stride, inside
                )
    gap, total = negative - positive, tl.log(negative_total)
    if POSITIVES:
        positive, total = positive + tl.log(positive_total), total - tl.log(positive_total)
    gap += total
    loss, pull = _loss_and_pull(gap, DECOUPLED)
    line = statistics + 3 * lines
    tl.store(line, tl.where(counted, positive + loss, float("inf")), inside)
    tl.store(line + 1, tl.where(counted, pull - smoothing, 0.0), inside)
    tl.store(line + 2, positive, inside)
    tl.store(sums + block, tl.sum(tl.where(counted, loss + smoothing * positive, 0.0), 0))


@triton.jit
def _add(sums, value):
    """Add a value to this program's slot."""
    slot = sums + tl.program_id(0)
    tl.store(slot, tl.load(slot) + value)


@triton.jit
def normalize_features(
    first, first_normalized, second, second_normalized, count,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write a row [SIZE] of the first side or, after its `count` rows, of the second at norm 1.

    A row without a direction becomes 0.
    """
    row = tl.program_id(0).to(tl.int64)
    if row < count:
        _normalize(first + row * SIZE, first_normalized + row * SIZE, SIZE, BLOCK)
    else:
        row -= count
        _normalize(second + row * SIZE, second_normalized + row * SIZE, SIZE, BLOCK)


@triton.jit
def _normalize(feature, normalized, SIZE, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    values = tl.load(feature + places, places < SIZE, 0.0).to(tl.float32)
    values = (values * _inverse_norm(values)).to(normalized.dtype.element_ty)
    tl.store(normalized + places, values, places < SIZE)


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
def _sigmoid(values):
    """Return 1 / (1 + exp(-value)); a square root's inverse takes less time than a division."""
    small = tl.exp2(tl.minimum(values * LOG2_E, 64.0))  # beyond 2**64 the result is 1
    root = tl.rsqrt(1.0 + small)
    return small * root * root


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
def sigmoid_gradient(
    anchors, candidates, description, row_groups, column_groups,
    row, column, height, width, n, m, scale, bias, gradient, sums, slots,
    WIDTH: tl.constexpr, ITSELF: tl.constexpr, GROUP: tl.constexpr, GRADIENT: tl.constexpr,
    BAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):
    """Write the gradient of a chunk of logits; add those of scale and bias, and the loss, to sums.

    sums: [3, slots], of which only the loss is written without GRADIENT.
    """
    down, across, rows, columns = _place(row, column, height, width, BAND, ROWS, COLUMNS)
    special = _special(
        row + down * ROWS, column + across * COLUMNS, n, m, description, ITSELF, GROUP, ROWS,
        COLUMNS,
    )
    total = _products(
        anchors, candidates, down * ROWS, across * COLUMNS, WIDTH, ROWS, COLUMNS, STEP
    )
    logits = total * tl.load(scale) + tl.load(bias)
    if special:
        positive, _, _ = _entries(
            rows, columns, n, m, description, row_groups, column_groups, ITSELF, GROUP
        )
        inside = (rows < n)[:, None] & (columns < m)[None, :]
        signs = tl.where(positive, -1.0, 1.0)
        loss = tl.sum(tl.where(inside, _softplus(signs * logits), 0.0))
        values = tl.where(inside, signs * _sigmoid(signs * logits), 0.0)
        scale_sum, bias_sum = tl.sum(values * total), tl.sum(values)
    else:
        loss = tl.sum(_softplus(logits))
        values = _sigmoid(logits)
        scale_sum, bias_sum = tl.sum(values * total), tl.sum(values)
    _add(sums + 2 * slots, loss)
    if GRADIENT:
        _add(sums, scale_sum)
        _add(sums + slots, bias_sum)
        gradient.store([down * ROWS, across * COLUMNS], values.to(tl.bfloat16))
