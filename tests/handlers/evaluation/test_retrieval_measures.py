"""nDCG, precision, R-precision and MAP@R compared with loops that sort the results of a query."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diptych.engine import BatchError, Evaluator
from diptych.handlers.evaluation import retrieval_ranks
from diptych.handlers.evaluation.retrieval import RetrievalMetric, RetrievalRecall
from diptych.handlers.evaluation.retrieval_measures import (
    RetrievalNDCG,
    RetrievalPrecision,
    RetrievalRPrecision,
)

KS = (1, 2, 5)
Vector = tuple[float, ...]


def cosine(a: Vector, b: Vector) -> float:
    norms = math.hypot(*a) * math.hypot(*b)
    return round(sum(x * y for x, y in zip(a, b, strict=True)) / norms, 9) if norms else 0.0


def precisions(order: Sequence[float]) -> list[float]:
    """Return the precision at each of the first results that match."""
    hits = [rank for rank, grade in enumerate(order, start=1) if grade > 0]
    return [(place + 1) / rank for place, rank in enumerate(hits)]


def gain(order: Sequence[float], k: int) -> float:
    return sum(grade / math.log2(rank + 2) for rank, grade in enumerate(order[:k]))


def of_query(similarities: Sequence[float], grades: Sequence[float]) -> dict[str, float]:
    """Sort the results of one query; of equally similar ones, those with low grades come first."""
    order = [g for _, g in sorted((-s, g) for s, g in zip(similarities, grades, strict=True))]
    ideal = sorted(order, reverse=True)
    relevant = len(precisions(order))
    first = precisions(order[:relevant])
    return {
        **{f"precision@{k}": len(precisions(order[:k])) / k for k in KS},
        **{f"ndcg@{k}": gain(order, k) / gain(ideal, k) for k in KS},
        "r_precision": len(first) / relevant,
        "map@r": sum(first) / relevant,
    }


def brute_force(
    images: Sequence[Vector], texts: Sequence[Vector], grades: Sequence[Sequence[float]]
) -> dict[str, float]:
    similar = [[cosine(a, b) for b in texts] for a in images]
    columns = list(zip(*similar, strict=True)), list(zip(*grades, strict=True))
    found = {}
    for name, rows in (("image_to_text", (similar, grades)), ("text_to_image", columns)):
        queries = [of_query(s, g) for s, g in zip(*rows, strict=True) if any(g)]
        for key in queries[0]:
            found[f"{name}/{key}"] = statistics.fmean(query[key] for query in queries)
    keys = {name.split("/")[1] for name in found}
    means = {k: (found[f"image_to_text/{k}"] + found[f"text_to_image/{k}"]) / 2 for k in keys}
    return {**found, **means}


def metrics_of(relevance: object = None) -> list[RetrievalMetric]:
    return [
        RetrievalNDCG(KS, relevance=relevance),
        RetrievalPrecision(KS, relevance=relevance),
        RetrievalRPrecision(relevance=relevance),
    ]


def computed(metrics: Sequence[RetrievalMetric], batches: Sequence[dict[str, Tensor]]) -> dict:
    values = {}
    for metric in metrics:
        for batch in batches:
            metric.update(batch)
        values.update(metric.compute())
    return values


def graded_batches(images: Sequence[Vector], texts: Sequence[Vector]) -> list[dict[str, Tensor]]:
    return [
        {"image_features": torch.tensor(images), "image_id": torch.arange(len(images))},
        {"text_features": torch.tensor(texts), "caption_id": torch.arange(len(texts))},
    ]


vectors = st.tuples(*[st.integers(-2, 2).map(float)] * 3)
sides = st.lists(vectors, min_size=1, max_size=9)


@settings(max_examples=40)
@given(images=sides, texts=sides, tile=st.sampled_from([(2, 3), (512, 512)]), data=st.data())
def test_graded_many_to_many_values_equal_those_of_sorting_all_results(images, texts, tile, data):
    row = st.lists(st.sampled_from([0, 0, 1, 2, 0.5]), min_size=len(texts), max_size=len(texts))
    grades = data.draw(st.lists(row, min_size=len(images), max_size=len(images)))
    grades[0][0] = 3
    table = torch.tensor(grades, dtype=torch.float64)
    relevance = data.draw(st.sampled_from([table, lambda i, t: table[i][:, t]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval_ranks, "STRIP", tile)
        patch.setattr(retrieval_ranks, "_tile_shape", lambda _: tile)
        patch.setattr(retrieval_ranks, "FEW", data.draw(st.sampled_from([0, 32])))
        found = computed(metrics_of(relevance), graded_batches(images, texts))
    assert found == pytest.approx(brute_force(images, texts, grades), abs=1e-12)


@settings(max_examples=40)
@given(
    images=st.lists(st.tuples(vectors, st.integers(0, 3)), min_size=1, max_size=12),
    texts=st.lists(st.tuples(vectors, st.integers(0, 3)), min_size=1, max_size=12),
    few=st.sampled_from([0, 32]),
)
def test_values_of_groups_equal_those_of_sorting_all_results(images, texts, few):
    texts = [*texts, (texts[0][0], images[0][1])]
    grades = [[float(a == b) for _, b in texts] for _, a in images]
    batches = []
    for side, items in (("image", images), ("text", texts)):
        rows, groups = zip(*items, strict=True)
        batches += [{f"{side}_features": torch.tensor(rows), "groups": torch.tensor(groups)}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval_ranks, "FEW", few)
        found = computed(metrics_of(), batches)
    expected = brute_force([v for v, _ in images], [v for v, _ in texts], grades)
    assert found == pytest.approx(expected, abs=1e-12)


def test_chance_is_the_mean_over_all_orders_of_the_results():
    grades = torch.tensor([[2.0, 0, 1, 0]])
    angles = torch.linspace(0.1, 1.5, 4)
    build: list[Callable[[], RetrievalMetric]] = [
        lambda: RetrievalRecall(KS, relevance=grades),
        *(lambda i=i: metrics_of(grades)[i] for i in range(3)),
    ]
    for one in build:
        found: dict[str, list[float]] = {}
        for order in itertools.permutations(range(4)):
            own = angles[list(order)]
            texts = torch.stack([own.cos(), own.sin()], dim=1).tolist()
            metric = one()
            for name, value in computed([metric], graded_batches([(1.0, 0.0)], texts)).items():
                found.setdefault(name, []).append(value)
        names = [name for name in found if name.startswith("image_to_text/")]
        assert names
        for name in names:
            assert metric.chance[name] == pytest.approx(statistics.fmean(found[name])), name


def of_shard(batches: Sequence[dict[str, Tensor]], grades: Tensor | None) -> dict[str, float]:
    return computed([*metrics_of(grades), RetrievalRecall(KS, relevance=grades)], batches)


def shard_batches(*, grouped: bool) -> list[dict[str, Tensor]]:
    batches = []
    for side, name, count in (("image", "image_id", 60), ("text", "caption_id", 100)):
        rows = {f"{side}_features": torch.randn(count, 4), name: torch.arange(count)}
        rows |= {"groups": torch.arange(count) % 2} if grouped else {}
        parts = torch.arange(count).split(40)
        batches += [{key: value[part] for key, value in rows.items()} for part in parts]
    return batches


@pytest.mark.parametrize("grades", [None, torch.arange(6000).view(60, 100) % 7 % 3])
def test_uneven_and_empty_shards_give_the_value_of_one_process(ranks, grades):
    batches = shard_batches(grouped=grades is None)
    expected = of_shard(batches, grades)
    for shards in ((batches[:1], batches[1:]), (batches, [])):
        for found in ranks.run(of_shard, [(shard, grades) for shard in shards]):
            assert found == pytest.approx(expected, abs=1e-12)


def test_a_relevance_without_ids_or_of_another_shape_is_refused():
    rows = {"image_features": torch.eye(3), "text_features": torch.eye(3)}
    with pytest.raises(BatchError, match="must have image_id and caption_id if relevance is given"):
        RetrievalNDCG(relevance=torch.eye(3)).update(rows)
    ids = {name: torch.arange(3) for name in ("image_id", "caption_id")}
    for wrong, message in (
        (lambda i, t: torch.ones(3), r"a tensor \[3, 3\] of grades >= 0, got shape \(3,\)"),
        (lambda i, t: -torch.eye(3), "and at least -1"),
        (lambda i, t: torch.zeros(3, 3), "relevance must be above 0 for some pair"),
    ):
        metric = RetrievalNDCG(relevance=wrong)
        metric.update({**rows, **ids})
        with pytest.raises(BatchError, match=message):
            metric.compute()
    with pytest.raises(ValueError, match=r"relevance must be \[images, texts\], got shape \(3,\)"):
        RetrievalNDCG(relevance=torch.ones(3))


def test_an_evaluator_publishes_them_side_by_side():
    rows = {name: torch.randn(12, 4) for name in ("image_features", "text_features")}
    batch = {**rows, "groups": torch.arange(12) // 3}
    evaluator = Evaluator(
        nn.Identity(), task=lambda _, batch: batch, metrics=metrics_of(), device="cpu"
    )
    assert evaluator.evaluate([batch]) == computed(metrics_of(), [batch])
