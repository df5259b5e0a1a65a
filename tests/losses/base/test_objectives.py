"""The pure functions, against loops over their matrices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.losses.base.objectives import (
    check_tile,
    hinge,
    masked_info_nce,
    masked_mean,
    off_diagonal,
    sigmoid,
)
from tests.losses.oracles import draw, lse, mean

N, M = 4, 5


def masks(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(N, M, generator=generator) < share for share in (0.3, 0.6))  # type: ignore[return-value]


@given(seed=st.integers(0, 10_000), inside=st.booleans(), smoothing=st.sampled_from([0.0, 0.2]))
def test_info_nce_is_the_loop_for_any_masks(seed: int, inside: bool, smoothing: float) -> None:
    values, weights = draw(N, M, seed=seed), draw(N, M, seed=seed + 1)
    positives, kept = masks(seed)
    found = masked_info_nce(
        values,
        positives,
        kept,
        log_weights=weights,
        reduction="logsumexp" if inside else "mean",
        label_smoothing=smoothing,
    )
    for i in range(N):
        numerator = [float(values[i, j]) for j in range(M) if positives[i, j]]
        columns = [j for j in range(M) if kept[i, j]]
        expected = 0.0
        if numerator and columns:
            target = (lse if inside else mean)(numerator)
            spread = mean(float(values[i, j]) for j in columns)
            denominator = lse(float(values[i, j] + weights[i, j]) for j in columns)
            expected = denominator - (1 - smoothing) * target - smoothing * spread
        assert math.isclose(float(found[i]), expected, rel_tol=1e-12, abs_tol=1e-12)


def test_rows_with_an_empty_set_are_zero_with_zero_gradient() -> None:
    values = draw(3, 4).requires_grad_()
    positives = torch.tensor([[False] * 4, [True] * 4, [True, False, False, False]])
    kept = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    for reduction in ("mean", "logsumexp"):
        losses = masked_info_nce(values, positives, kept, reduction=reduction)
        (gradient,) = torch.autograd.grad(losses.sum(), values)
        assert losses[:2].tolist() == [0.0, 0.0]
        assert not gradient[:2].any()
        assert bool(gradient.isfinite().all())
        assert bool(gradient[2].any())


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_info_nce_does_not_overflow_in_float32(scale: float) -> None:
    values = (draw(3, 3).float() * scale).requires_grad_()
    losses = masked_info_nce(values, torch.eye(3, dtype=torch.bool))
    losses.sum().backward()
    assert bool(losses.isfinite().all())
    assert values.grad is not None
    assert bool(values.grad.isfinite().all())


def test_sigmoid_is_the_loop() -> None:
    values, positives = draw(N, M), masks(3)[0]
    for i, row in enumerate(values.tolist()):
        expected = math.fsum(
            math.log1p(math.exp(-value if positives[i, j] else value))
            for j, value in enumerate(row)
        )
        assert math.isclose(float(sigmoid(values, positives)[i]), expected, rel_tol=1e-12)


def test_hinge_is_the_loop() -> None:
    similarity, positive, negatives = draw(N, M), draw(N, seed=1), masks(5)[1]
    expected = [
        [
            max(0.0, 0.2 + float(similarity[i, j]) - float(positive[i])) * bool(negatives[i, j])
            for j in range(M)
        ]
        for i in range(N)
    ]
    torch.testing.assert_close(
        hinge(positive, similarity, negatives, 0.2).tolist(), expected, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("n", [1, 2, 5])
def test_off_diagonal_leaves_out_only_the_diagonal(n: int) -> None:
    matrix = torch.arange(n * n).view(n, n)
    expected = [i * n + j for i in range(n) for j in range(n) if i != j]
    assert off_diagonal(matrix).tolist() == expected


def test_the_mean_of_an_empty_row_is_zero() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert masked_mean(torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 3.0]]), mask).tolist() == [3, 0]


@pytest.mark.parametrize("tile", ["auto", None, 1, 4096])
def test_a_tile_may_be_automatic_none_or_a_size(tile: int | str | None) -> None:
    check_tile(tile)


@pytest.mark.parametrize("tile", ["big", 0, -4, True, 2.5])
def test_any_other_tile_is_refused(tile: object) -> None:
    with pytest.raises(ValueError, match="tile must be 'auto', None or a number of rows"):
        check_tile(tile)  # type: ignore[arg-type]
