"""Retrieval metrics compared with loops that sort the results of each query."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.exceptions import NotComputableError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.engine import BatchError, Evaluator, tasks
from diptych.handlers.evaluation import retrieval, retrieval_ranks
from diptych.handlers.evaluation.retrieval import RetrievalMetrics, RetrievalRecall
from diptych.handlers.evaluation.retrieval_measures import RetrievalRPrecision

Item = tuple[tuple[float, ...], int]
KS = (1, 2, 5)


def unit(vector: Sequence[float]) -> list[float]:
    norm = math.sqrt(sum(x * x for x in vector))
    return [x / norm if norm else 0.0 for x in vector]


def similarity(a: Sequence[float], b: Sequence[float]) -> float:
    return round(sum(x * y for x, y in zip(unit(a), unit(b), strict=True)), 9)


def direction(queries: Sequence[Item], gallery: Sequence[Item]) -> dict[str, float]:
    """Sort the whole gallery for every query, wrong results first where similarities are equal."""
    values: dict[str, list[float]] = {}
    ranks = []
    for vector, group in queries:
        results = sorted((-similarity(vector, v), g == group) for v, g in gallery)
        hits = [place for place, (_, match) in enumerate(results, start=1) if match]
        if not hits:
            continue
        ranks.append(hits[0])
        values.setdefault("mrr", []).append(1 / hits[0])
        for k in KS:
            values.setdefault(f"recall@{k}", []).append(float(hits[0] <= k))
            precisions = [sum(h <= hit for h in hits) / hit for hit in hits if hit <= k]
            values.setdefault(f"map@{k}", []).append(sum(precisions) / min(len(hits), k))
    found = {name: statistics.fmean(own) for name, own in values.items()}
    return {
        **found,
        "median_rank": statistics.median(ranks),
        "mean_rank": statistics.fmean(ranks),
    }


def brute_force(images: Sequence[Item], texts: Sequence[Item]) -> dict[str, float]:
    first, second = direction(images, texts), direction(texts, images)
    return {
        **{name: (first[name] + second[name]) / 2 for name in first},
        **{f"image_to_text/{name}": value for name, value in first.items()},
        **{f"text_to_image/{name}": value for name, value in second.items()},
    }


def as_batch(side: str, items: Sequence[Item]) -> dict[str, Tensor]:
    vectors, groups = zip(*items, strict=True)
    return {f"{side}_features": torch.tensor(vectors), "groups": torch.tensor(groups)}


def updated(metric: RetrievalRecall, batches: Sequence[dict[str, Tensor]]) -> RetrievalRecall:
    for batch in batches:
        metric.update(batch)
    return metric


# Small whole numbers: equal similarities are frequent, and unequal ones lie 1e-5 apart or more.
vectors = st.tuples(*[st.integers(-2, 2).map(float)] * 3)
sides = st.lists(st.tuples(vectors, st.integers(0, 5)), min_size=1, max_size=14)


@given(
    images=sides,
    texts=sides,
    repeats=st.lists(st.integers(0, 100), max_size=8),
    cut=st.tuples(st.integers(1, 14), st.sampled_from([1, 5, 4096])),
    tile=st.sampled_from([(2, 3), (512, 512)]),
)
def test_every_value_equals_that_of_sorting_all_results(images, texts, repeats, cut, tile):
    size, piece = cut
    texts = [*texts, (texts[0][0], images[0][1])]  # at least one pair matches
    batches = []
    for side, name, items in (("image", "image_id", images), ("text", "caption_id", texts)):
        rows = [*range(len(items)), *(number % len(items) for number in repeats)]
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            batch = as_batch(side, [items[row] for row in part])
            # Without repeated rows, each row is an item of its own: no ids are needed.
            batches.append({**batch, name: torch.tensor(part)} if repeats else batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "PIECE", piece)
        patch.setattr(retrieval_ranks, "STRIP", tile)
        patch.setattr(retrieval_ranks, "_tile_shape", lambda _: tile)
        metric = updated(RetrievalMetrics(KS), batches)
        values = metric.compute()
    assert values == pytest.approx(brute_force(images, texts), abs=1e-12)
    assert metric.compute() == values


@given(pairs=st.lists(st.tuples(vectors, vectors), min_size=1, max_size=12))
def test_without_groups_a_row_matches_only_itself(pairs):
    images, texts = zip(*pairs, strict=True)
    metric = RetrievalMetrics(KS)
    for start in range(0, len(pairs), 5):
        batch = {"image_features": images, "text_features": texts}
        metric.update({key: torch.tensor(v[start : start + 5]) for key, v in batch.items()})
    expected = brute_force(
        [(v, i) for i, v in enumerate(images)], [(v, i) for i, v in enumerate(texts)]
    )
    assert metric.compute() == pytest.approx(expected, abs=1e-12)


def make_captioned(images: int = 40, captions: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    features = torch.randn(images, 8)
    texts = features.repeat_interleave(captions, 0) + 1.2 * torch.randn(images * captions, 8)
    return features, texts, torch.arange(images)


def captioned_batches() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return batches that repeat each image for its captions, and all images and captions once."""
    images, texts, groups = make_captioned()
    order = torch.randperm(200)
    rows = groups.repeat_interleave(5)[order]
    repeated = {
        "image_features": images[rows],
        "text_features": texts[order],
        "image_id": rows,
        "caption_id": order,
    }
    once = {"image_features": images, "text_features": texts, "groups": groups}
    batches = [{name: value[part] for name, value in repeated.items()} for part in order.split(32)]
    return batches, {**once, "text_groups": groups.repeat_interleave(5)}


def test_an_image_repeated_for_each_of_its_captions_is_one_image():
    batches, once = captioned_batches()
    expected = updated(RetrievalMetrics(), [once]).compute()
    assert 0.2 < expected["recall@1"] < 0.9
    assert updated(RetrievalMetrics(), batches).compute() == pytest.approx(expected, abs=1e-12)
    grouped = [{**batch, "groups": batch["image_id"] + 3} for batch in batches]
    assert updated(RetrievalMetrics(), grouped).compute() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "written",
    [
        torch.tensor,
        lambda ids: [f"{i:012}.jpg" for i in ids],
        np.array,
        lambda ids: [*np.array(ids)],
    ],
)
def test_ids_are_read_from_the_batch(written):
    batches, once = captioned_batches()
    rows = [
        {name: value for name, value in batch.items() if name.endswith("features")}
        | {name: written(batch[name].tolist()) for name in ("image_id", "caption_id")}
        for batch in batches
    ]
    evaluator = Evaluator(
        nn.Identity(),
        task=lambda _, batch: {k: v for k, v in batch.items() if k.endswith("features")},
        metrics=[RetrievalMetrics()],
        device="cpu",
    )
    expected = updated(RetrievalMetrics(), [once]).compute()
    assert evaluator.evaluate(rows) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(BatchError, match="image_id must be whole numbers or texts"):
        evaluator.evaluate([{**rows[0], "image_id": [0.5] * 32}])


def test_captions_that_an_untrained_model_cannot_tell_apart_are_all_counted():
    images, texts, groups = make_captioned()
    cone = 1e4 * torch.ones(8)
    sides = {
        "image_features": images + cone,
        "text_features": texts + cone,
        "groups": groups,
        "text_groups": groups.repeat_interleave(5),
    }
    values = updated(RetrievalMetrics(), [sides]).compute()
    first, second = (
        x.double() / x.double().norm(dim=1, keepdim=True)
        for x in (sides["image_features"], sides["text_features"])
    )
    scores = second @ first.T
    own = sides["text_groups"]
    ranks = 1 + (scores > scores.gather(1, own[:, None])).sum(1)
    assert scores.min() > 1 - 1e-5
    assert values["text_to_image/mean_rank"] == pytest.approx(float(ranks.double().mean()))
    assert values["text_to_image/recall@1"] == pytest.approx(float((ranks == 1).double().mean()))


def test_a_loader_that_seems_to_repeat_images_without_ids_is_reported_once(caplog):
    batches, once = captioned_batches()
    metric = updated(RetrievalRecall(), batches)
    metric.compute()
    updated(metric, []).compute()
    updated(RetrievalRecall(), [once]).compute()
    assert not caplog.records
    grouped = [
        {**batch, "groups": batch["image_id"], "image_id": None, "caption_id": None}
        for batch in batches
    ]
    metric = updated(RetrievalRecall(), grouped)
    metric.compute()
    metric.compute()
    (record,) = caplog.records
    assert "several images and several texts have one group" in record.message


def test_a_row_without_a_group_matches_its_own_pair_alone(caplog):
    images, texts = torch.randn(8, 4), torch.randn(8, 4)
    rows = {"image_features": images, "text_features": texts}
    groups = torch.tensor([0, 0, 1, 2, -100, -100, -100, -100])
    own = torch.tensor([0, 0, 1, 2, 11, 12, 13, 14])
    expected = updated(RetrievalMetrics(), [{**rows, "groups": own}]).compute()
    caplog.clear()
    found = updated(RetrievalMetrics(), [{**rows, "groups": groups}]).compute()
    assert found == pytest.approx(expected, abs=1e-12)
    assert not [one for one in caplog.records if one.levelname == "ERROR"]
    minus_one = groups.masked_fill(groups < 0, -1)
    assert updated(RetrievalMetrics(), [{**rows, "groups": minus_one}]).compute() == found
    (record,) = [one for one in caplog.records if one.levelname == "ERROR"]
    assert "groups must be >= 0, or -100 for a sample without one, got -1" in record.message


def test_one_id_in_two_groups_is_refused():
    rows = {"image_features": torch.eye(3), "text_features": torch.eye(3)}
    ids = {"image_id": torch.tensor([7, 8, 7]), "groups": torch.tensor([0, 1, 2])}
    with pytest.raises(BatchError, match="must be in one group, got id 7 in several"):
        updated(RetrievalRecall(), [{**rows, **ids}]).compute()


@pytest.mark.parametrize("piece", [1, 16, 40, 4096])
def test_values_do_not_depend_on_the_pieces_in_which_batches_are_stored(monkeypatch, piece):
    images, texts, groups = make_captioned()
    whole = {"image_features": images, "text_features": texts[::5], "groups": groups}
    expected = updated(RetrievalMetrics(), [whole]).compute()
    monkeypatch.setattr(retrieval, "PIECE", piece)
    batches = [{key: value[part] for key, value in whole.items()} for part in groups.split(8)]
    assert updated(RetrievalMetrics(), batches).compute() == expected


def test_ranks_over_many_tiles_are_those_of_the_whole_matrix():
    images, texts = torch.randn(700, 16), torch.randn(1300, 16)
    image_groups, text_groups = torch.randperm(700) // 2, torch.randint(0, 350, (1300,))
    metric = RetrievalRecall(k=(1, 20))
    metric.update({"image_features": images, "groups": image_groups})
    metric.update({"text_features": texts, "groups": text_groups})
    unit_images, unit_texts = (
        x.double() / x.double().norm(dim=1, keepdim=True) for x in (images, texts)
    )
    scores = unit_images @ unit_texts.T
    matches = image_groups[:, None] == text_groups
    for name, s, m in (("image_to_text", scores, matches), ("text_to_image", scores.T, matches.T)):
        best = s.masked_fill(~m, -2).max(1).values
        ranks = 1 + ((s >= best[:, None]) & ~m).sum(1)
        expected = (ranks[m.any(1)] <= 20).double().mean()
        assert metric.compute()[f"{name}/recall@20"] == pytest.approx(float(expected), abs=1e-12)


def test_a_collapsed_model_gets_no_recall():
    same = torch.ones(20, 4) / 3
    metric = updated(RetrievalMetrics(), [{"image_features": same, "text_features": same}])
    assert metric.compute()["recall@10"] == 0
    assert metric.compute()["mean_rank"] == 20


def test_nan_features_rank_last():
    nan = torch.full((20, 4), math.nan)
    metric = updated(
        RetrievalMetrics(), [{"image_features": nan, "text_features": torch.randn(20, 4)}]
    )
    assert metric.compute()["recall@10"] == 0
    assert metric.compute()["median_rank"] == 20


def test_a_text_without_a_match_is_no_query_but_remains_in_the_gallery():
    images = {"image_features": torch.eye(3), "groups": torch.tensor([0, 1, 2])}
    texts = torch.cat([torch.eye(3), torch.tensor([[1.0, 0.1, 0.0]]) @ torch.eye(3)])
    texts[0] = torch.tensor([0.9, 0.5, 0.0])
    metric = updated(
        RetrievalRecall(1), [images, {"text_features": texts, "groups": torch.tensor([0, 1, 2, 9])}]
    )
    values = metric.compute()
    assert values["image_to_text/recall@1"] == pytest.approx(2 / 3)
    assert values["text_to_image/recall@1"] == 1


def test_the_pair_of_a_half_precision_model_is_found():
    features = torch.randn(30, 16).bfloat16()
    metric = updated(RetrievalRecall(1), [{"image_features": features, "text_features": features}])
    assert metric.compute()["recall@1"] == 1


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("build", [RetrievalMetrics, RetrievalRPrecision])
def test_no_tensor_grows_with_images_times_texts(build):
    metric, rows = build(), torch.randn(2, 1500, 4)
    groups = torch.arange(1500) // (2 if build is RetrievalMetrics else 750)
    metric.update({"image_features": rows[0], "text_features": rows[1], "groups": groups})
    with Largest() as largest:
        metric.compute()
    assert largest.size <= 2 * 512 * 512 < 1500 * 1500 / 4


def test_the_metric_is_reset_by_each_evaluation():
    class Towers(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            return image, text

    def loader(rows: Tensor) -> list[dict[str, Tensor]]:
        return [{"image": part, "text": part} for part in rows.split(4)]

    evaluator = Evaluator(
        Towers(), task=tasks.image_text, metrics=[RetrievalRecall(k=1)], device="cpu"
    )
    assert evaluator.evaluate(loader(torch.ones(10, 3)))["recall@1"] == 0
    assert evaluator.evaluate(loader(torch.randn(10, 3)))["recall@1"] == 1


def run_shard(batches: list[dict[str, Tensor]]) -> dict[str, float]:
    return updated(RetrievalMetrics(), batches).compute()


@pytest.mark.parametrize("sizes", [(7, 33), (40, 0)])
def test_uneven_shards_give_the_value_of_one_process(ranks, sizes):
    images, texts, groups = make_captioned()
    rows = groups.repeat_interleave(5)
    shards, start = [], 0
    for size in sizes:
        part = slice(5 * start, 5 * (start + size))
        batch = {
            "image_features": images[rows][part],
            "text_features": texts[part],
            "groups": rows[part],
            "image_id": rows[part],
        }
        shards.append([batch] if size else [])
        start += size
    expected = run_shard([batch for shard in shards for batch in shard])
    for found in ranks.run(run_shard, [(shard,) for shard in shards]):
        assert found == expected


def test_shards_of_pairs_without_groups_and_of_one_side_give_the_value_of_one_process(ranks):
    images, texts = torch.randn(12, 4), torch.randn(12, 4)
    pairs = [
        {"image_features": images[p], "text_features": texts[p]} for p in (slice(5), slice(5, 12))
    ]
    empty = {name: side[:0] for name, side in pairs[0].items()}  # a rank may have none of the last
    for found in ranks.run(run_shard, [([pair, empty],) for pair in pairs]):
        assert found == run_shard(pairs)
    one_sided = [
        {"image_features": images, "groups": torch.arange(12)},
        {"text_features": texts, "groups": torch.arange(12)},
    ]
    for found in ranks.run(run_shard, [([batch],) for batch in one_sided]):
        assert found == run_shard(pairs)


@pytest.mark.parametrize("k", [0, -1, (), (1, 1), (1.5,), (True,)])
def test_a_k_that_is_no_positive_whole_number_is_refused(k):
    with pytest.raises(ValueError, match="k must be different whole numbers >= 1, got"):
        RetrievalRecall(k)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"logits": torch.ones(2, 3)}, "needs image_features or text_features, got logits"),
        ({"image_features": torch.ones(2, 3)}, "as many images as texts, got 2 and none"),
        ({"image_features": torch.ones(3), "groups": torch.zeros(3).long()}, r"must be \[B, D\]"),
        ({"image_features": torch.ones(2, 3), "groups": torch.zeros(2)}, r"integers \[2\]"),
        ({"image_features": torch.ones(2, 3), "groups": torch.zeros(3).long()}, r"integers \[2\]"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch, message):
    with pytest.raises(BatchError, match=message):
        RetrievalRecall().update(batch)


def test_groups_in_some_batches_only_are_refused():
    rows = {"image_features": torch.ones(2, 3), "text_features": torch.ones(2, 3)}
    metric = updated(RetrievalRecall(), [rows])
    with pytest.raises(BatchError, match="groups must be in all batches or in none"):
        metric.update({**rows, "groups": torch.zeros(2).long()})


def test_sides_without_a_match_are_refused():
    metric = updated(
        RetrievalRecall(),
        [as_batch("image", [((1.0, 0.0), 0)]), as_batch("text", [((1.0, 0.0), 1)])],
    )
    with pytest.raises(BatchError, match="got no image that matches any text"):
        metric.compute()


def test_a_metric_without_a_batch_cannot_be_computed():
    with pytest.raises(NotComputableError, match="at least one image and one text"):
        RetrievalRecall().compute()
