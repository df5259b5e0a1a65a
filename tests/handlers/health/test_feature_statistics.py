"""Feature statistics compared with loops and closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diptych.handlers.health import feature_statistics as statistics

ROWS, DIM = 7, 5


def make_sides(seed: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(rows, DIM, generator=generator) for _ in range(2))
    return statistics.unit(first.double()), statistics.unit((first + second).double())


def test_features_are_normalised_in_float32_and_zeros_stay_zero():
    features = statistics.unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16))
    torch.testing.assert_close(features, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_unused_dimensions_are_dead(share):
    alive = int(64 * share)
    features = torch.zeros(5000, 64)
    features[:, :alive] = torch.randn(5000, alive, generator=torch.Generator().manual_seed(0))
    values = statistics.spread(statistics.moments(statistics.unit(features))[1])
    assert float(values["dead_dimensions"]) == 1 - share
    # Unit features that fill a of D dimensions evenly have a standard deviation of 1 / sqrt(a).
    assert float(values["spread"]) == pytest.approx(share**0.5, abs=0.01)


def test_equal_features_have_no_spread_and_a_uniformity_of_zero():
    point = statistics.unit(torch.ones(6, 4))
    values = statistics.spread(statistics.moments(point)[1])
    assert float(values["spread"]) == pytest.approx(0, abs=1e-3)
    assert float(statistics.uniformity(point)) == pytest.approx(0, abs=1e-6)


@given(seed=st.integers(0, 30))
def test_uniformity_is_that_of_a_loop_over_pairs(seed):
    side, _ = make_sides(seed)
    terms = [
        math.exp(-2 * float((a - b).square().sum()))
        for i, a in enumerate(side)
        for j, b in enumerate(side)
        if i != j
    ]
    expected = math.log(sum(terms) / len(terms))
    assert float(statistics.uniformity(side)) == pytest.approx(expected, rel=1e-9)


def plain_pairs(s: list[list[float]], ids: list[int]) -> dict[str, float]:
    """Loop over the similarities of every first to every second side."""
    wrong = [(i, j) for i in range(ROWS) for j in range(ROWS) if ids[i] != ids[j]]
    below, best = [], [True] * (2 * ROWS)
    for i, j in wrong:
        for query, own in ((i, s[i][i]), (ROWS + j, s[j][j])):
            below.append((s[i][j] < own) + (s[i][j] == own) / 2)
            best[query] &= s[i][j] < own
    positive = sum(s[i][i] for i in range(ROWS)) / ROWS
    negative = sum(s[i][j] for i, j in wrong) / len(wrong)
    return {
        "positive_similarity": positive,
        "negative_similarity": negative,
        "margin": positive - negative,
        "alignment": 2 - 2 * positive,
        "auroc": sum(below) / len(below),
        "in_batch_accuracy": sum(best) / len(best),
    }


@given(seed=st.integers(0, 30))
@pytest.mark.parametrize(
    "ids", [list(range(ROWS)), [0, 0, 1, 2, 3, 3, 4], [0, 0, -100, -100, -1, -1, 4]]
)
def test_pair_statistics_equal_those_of_a_loop(seed, ids):
    first, second = make_sides(seed)
    groups = torch.tensor(ids) if len(set(ids)) < ROWS else None
    negatives = statistics.negative_mask(ROWS, groups, first.device)
    found = {k: float(v) for k, v in statistics.pair_statistics(first, second, negatives).items()}
    apart = [100 + row if one in {-100, -1} else one for row, one in enumerate(ids)]
    expected = plain_pairs([[float(a @ b) for b in second] for a in first], apart)
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_collapsed_model_is_at_chance_and_finds_nothing():
    point = statistics.unit(torch.ones(6, 4))
    negatives = statistics.negative_mask(6, None, point.device)
    values = statistics.pair_statistics(point, point, negatives)
    assert float(values["auroc"]) == 0.5
    assert float(values["in_batch_accuracy"]) == 0


def test_duplicates_are_rows_with_the_content_of_another_group():
    side = statistics.unit(torch.eye(6))
    side[1] = side[0]  # equal features
    numbers = torch.tensor([0, 1, 2, 2, 4, 5])  # equal texts
    alone = statistics.negative_mask(6, None, side.device)
    found = statistics.duplicates(side[None], [numbers], alone)
    assert float(found) == pytest.approx(4 / 6)
    grouped = statistics.negative_mask(6, torch.tensor([0, 0, 2, 3, 4, 5]), side.device)
    assert float(statistics.duplicates(side[None], [numbers], grouped)) == pytest.approx(2 / 6)


def test_collapsed_features_are_no_duplicates():
    point = statistics.unit(torch.ones(6, 4))
    alone = statistics.negative_mask(6, None, point.device)
    assert float(statistics.duplicates(point[None], [], alone)) == 0


@given(seed=st.integers(0, 30), rows=st.sampled_from([3, 20]))
def test_rankme_is_the_exponential_entropy_of_the_singular_values(seed, rows):
    side, _ = make_sides(seed, rows)
    singular = torch.linalg.svdvals(side).tolist()
    shares = [value / sum(singular) for value in singular]
    expected = math.exp(-sum(p * math.log(p) for p in shares if p > 0))
    found = float(statistics.rankme(statistics.gram(side)))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_counts_directions_of_equal_strength(rank):
    features = torch.eye(8)[torch.arange(24) % rank]
    assert float(statistics.rankme(statistics.gram(features))) == pytest.approx(rank)


def plain_lidar(views: list[Tensor], regularization: float) -> float:
    stacked = torch.stack(views).double()
    count, samples, dim = stacked.shape
    means = stacked.mean(0)
    s_b, s_w = torch.zeros(dim, dim).double(), torch.zeros(dim, dim).double()
    for i in range(samples):
        offset = means[i] - means.mean(0)
        s_b += torch.outer(offset, offset) / samples
        for view in range(count):
            around = stacked[view, i] - means[i]
            s_w += torch.outer(around, around) / (samples * count)
    values, vectors = torch.linalg.eigh(s_w + regularization * torch.eye(dim))
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    spectrum = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).tolist()
    shares = [value / sum(spectrum) for value in spectrum]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


@pytest.mark.parametrize("rows", [4, 30])
@pytest.mark.parametrize("regularization", [1e-4, 0.1])
def test_lidar_is_that_of_its_definition(rows, regularization):
    views = list(make_sides(3, rows))
    found = float(statistics.lidar(views, regularization))
    assert found == pytest.approx(plain_lidar(views, regularization), rel=1e-5)


def test_the_spectra_of_nan_features_are_nan():
    features = torch.full((4, 3), math.nan)
    assert math.isnan(float(statistics.rankme(statistics.gram(features))))
    assert math.isnan(float(statistics.lidar([features, features])))


def of_shard(first: Tensor, second: Tensor) -> list[float]:
    mean, deviation = statistics.moments(first)
    spectra = [
        statistics.rankme(statistics.gram(first)),
        statistics.lidar([first, second]),
    ]
    return [*mean.tolist(), *deviation.tolist(), *(float(value) for value in spectra)]


def test_moments_and_spectra_of_uneven_shards_are_those_of_all_rows(ranks):
    first, second = make_sides(4, 20)
    shards = [(first[:6], second[:6]), (first[6:], second[6:])]
    for found in ranks.run(of_shard, shards):
        assert found == pytest.approx(of_shard(first, second), rel=1e-6)
