"""Probes compared with plain loops: used by hand, in an evaluation and over ranks."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from torch import Tensor, nn

from diptych.engine import BatchError, Evaluator, Trainer, tasks
from diptych.handlers.evaluation import probes
from diptych.handlers.evaluation.evaluation import Evaluation
from diptych.handlers.evaluation.label_accuracy import ClassificationAccuracy
from diptych.handlers.evaluation.linear_probes import LinearProbeAccuracy
from diptych.handlers.evaluation.probes import KNNAccuracy, ZeroShotAccuracy

Output = dict[str, Tensor]


def unit(vector: list[float]) -> list[float]:
    norm = math.sqrt(sum(x * x for x in vector))
    return [x / norm for x in vector]


def cosine(a: Tensor, b: Tensor) -> float:
    pairs = zip(unit(a.tolist()), unit(b.tolist()), strict=True)
    return sum(x * y for x, y in pairs)


def make_samples(count: int, seed: int, *, classes: int = 4, dim: int = 6) -> Output:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    noise = torch.randn(count, dim, generator=generator)
    return {"features": centres[labels] + noise, "labels": labels}


def vote(bank: Output, query: Tensor, k: int, temperature: float) -> int:
    similar = [(cosine(row, query), int(label)) for row, label in zip(*bank.values(), strict=True)]
    votes: Counter[int] = Counter()
    for similarity, label in sorted(similar, reverse=True)[:k]:
        votes[label] += math.exp(similarity / temperature)
    return max(votes, key=lambda label: votes[label])


def by_hand(probe: probes.BankProbe, bank: Output, queries: Output, size: int = 7) -> float:
    for part in torch.arange(len(bank["labels"])).split(size):
        probe.remember({name: value[part] for name, value in bank.items()})
    probe.fit()
    probe.reset()
    for part in torch.arange(len(queries["labels"])).split(size):
        probe.update({name: value[part] for name, value in queries.items()})
    return probe.compute()


@given(
    k=st.integers(1, 40),
    temperature=st.sampled_from([0.02, 0.1, 1.0]),
    tile=st.sampled_from([(3, 5), (512, 8192)]),
    seed=st.integers(0, 20),
)
def test_the_vote_equals_a_loop_over_the_sorted_bank(k, temperature, tile, seed):
    bank, queries = make_samples(40, seed), make_samples(15, seed + 100)
    expected = [vote(bank, query, k, temperature) for query in queries["features"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "QUERIES", tile[0])
        patch.setattr(probes, "ROWS", tile[1])
        accuracy = by_hand(KNNAccuracy(k=k, temperature=temperature), bank, queries)
    right = sum(a == b for a, b in zip(expected, queries["labels"].tolist(), strict=True))
    assert accuracy == pytest.approx(right / 15)


def test_a_cold_vote_does_not_overflow():
    bank, queries = make_samples(40, 0), make_samples(15, 1)
    cold = by_hand(KNNAccuracy(k=40, temperature=1e-4), bank, queries)
    assert cold == by_hand(KNNAccuracy(k=1), bank, queries)


def loader(samples: Output, size: int = 8) -> list[Output]:
    parts = torch.arange(len(samples["labels"])).split(size)
    return [{name: value[part] for name, value in samples.items()} for part in parts]


class Tower(nn.Module):
    """A model of one layer, whose features depend on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image)


def labelled(model: nn.Module, batch: Output) -> Output:
    return {"features": model(batch["features"]), "labels": batch["labels"]}


def test_each_evaluation_encodes_the_bank_with_the_current_model():
    torch.manual_seed(0)
    model, loss = Tower(), nn.CrossEntropyLoss()
    bank, queries = make_samples(40, 0), make_samples(20, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = Trainer(
        model,
        loss,
        optimizer,
        task=lambda model, batch: {"logits": model(batch["features"]), "labels": batch["labels"]},
        device="cpu",
    )
    found, expected = [], []
    evaluation = Evaluation(
        loader(queries), metrics=[KNNAccuracy(loader(bank), k=5)], task=labelled, every=1
    )
    trainer.attach(evaluation)

    @trainer.on("EVALUATED")
    def compare() -> None:
        found.append(trainer.state.metrics["val/knn_accuracy"])
        encoded = [labelled(model, samples) for samples in (bank, queries)]
        expected.append(by_hand(KNNAccuracy(k=5), *encoded))

    trainer.run(loader(make_samples(24, 2)), max_epochs=1)
    assert found == expected
    assert len(found) == 3


def shard(samples: Output, part: slice) -> Output:
    return {name: value[part] for name, value in samples.items()}


def knn_of_shard(bank: Output | None, queries: Output | None) -> float:
    probe = KNNAccuracy(k=7)
    if bank is not None:
        probe.remember(bank)
    probe.fit()
    if queries is not None:
        probe.update(queries)
    return probe.compute()


@pytest.mark.parametrize("cut", [10, 33])
def test_neighbours_of_uneven_shards_give_the_value_of_one_process(ranks, cut):
    bank, queries = make_samples(40, 0), make_samples(20, 1)
    shards = [
        (shard(bank, slice(cut)), shard(queries, slice(3))),
        (shard(bank, slice(cut, 40)), shard(queries, slice(3, 20))),
    ]
    assert ranks.run(knn_of_shard, shards) == [knn_of_shard(bank, queries)] * 2


def test_a_rank_without_samples_takes_part(ranks):
    bank, queries = make_samples(40, 0), make_samples(20, 1)
    assert (
        ranks.run(knn_of_shard, [(None, queries), (bank, None)])
        == [knn_of_shard(bank, queries)] * 2
    )


EMBEDDINGS = {
    "cat": [3.0, 1.0],
    "dog": [1.0, 3.0],
    "a cat.": [1.0, 0.2],
    "a dog.": [-0.5, 9.0],
}


def encode(model: nn.Module, prompts: list[str]) -> Tensor:
    return torch.tensor([EMBEDDINGS[prompt] for prompt in prompts])


@pytest.mark.parametrize("prompts", [1, 3, 256])
def test_a_class_is_the_unit_mean_of_its_unit_prompts(prompts):
    metric = ZeroShotAccuracy(
        ["cat", "dog"], templates=["{}", "a {}."], encode=encode, prompts=prompts
    )
    found = metric.fit(nn.Identity())
    expected = []
    for name in ("cat", "dog"):
        both = [unit(EMBEDDINGS[name]), unit(EMBEDDINGS[f"a {name}."])]
        expected.append(unit([sum(x) / 2 for x in zip(*both, strict=True)]))
    torch.testing.assert_close(found, torch.tensor(expected))
    metric.reset()
    metric.update({"features": torch.eye(2), "labels": torch.tensor([0, 1])})
    metric.update({"features": torch.eye(2), "labels": torch.tensor([1, 1])})
    assert metric.compute() == 0.75


def test_prompts_are_encoded_by_the_model_that_is_evaluated():
    class Turned(nn.Module):
        sign = 1.0

    model = Turned()
    metric = ZeroShotAccuracy(
        ["cat", "dog"], encode=lambda model, prompts: model.sign * encode(model, prompts)
    )
    evaluator = Evaluator(model, task=lambda _, batch: batch, metrics=[metric], device="cpu")
    batch = {"features": torch.eye(2), "labels": torch.tensor([0, 1])}
    assert evaluator.evaluate([batch]) == {"zero_shot_accuracy": 1.0}
    model.sign = -1.0
    assert evaluator.evaluate([batch]) == {"zero_shot_accuracy": 0.0}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KNNAccuracy(k=0), "k must be a whole number >= 1, got 0"),
        (lambda: KNNAccuracy(temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda: ZeroShotAccuracy([], encode=encode), "classes must be one name or more"),
        (lambda: ZeroShotAccuracy("cat", encode=encode), "in a list, got 'cat'"),
        (
            lambda: ZeroShotAccuracy(["cat"], encode=encode, templates=["a photo"]),
            r"templates must be a list of texts with '\{\}'",
        ),
        (lambda: ZeroShotAccuracy(["cat"], encode=encode, prompts=0), "prompts must be >= 1"),
    ],
)
def test_an_argument_out_of_range_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("none", [-100, -1])
def test_samples_without_a_label_count_neither_in_the_bank_nor_among_the_queries(caplog, none):
    samples = make_samples(40, 0), make_samples(15, 1)
    labelled = [{name: value.clone() for name, value in part.items()} for part in samples]
    for part in labelled:
        part["labels"][::3] = none
    rows = [torch.arange(len(part["labels"])) % 3 > 0 for part in samples]
    without = [
        {name: value[row] for name, value in part.items()}
        for part, row in zip(samples, rows, strict=True)
    ]
    assert by_hand(KNNAccuracy(k=5), *labelled) == by_hand(KNNAccuracy(k=5), *without)
    reported = {record.message.split(",")[0] for record in caplog.records}
    expected = {
        "KNNAccuracy: the bank's labels must be >= 0",
        "KNNAccuracy: labels must be in [0",
    }
    assert reported == (set() if none == -100 else expected)


@pytest.mark.parametrize("probe", [partial(KNNAccuracy, k=3), LinearProbeAccuracy])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_wrong_and_spoil_no_other(probe, value):
    labels = torch.arange(20) % 2
    sides = torch.stack((2.0 * labels - 1, torch.linspace(-1, 1, 20)), dim=1)
    broken = {"features": sides.index_fill(0, torch.arange(0, 20, 5), value), "labels": labels}
    assert by_hand(probe(), broken, {"features": sides, "labels": labels}) == 1
    assert by_hand(probe(), {"features": sides, "labels": labels}, broken) == 16 / 20
    broken["features"] = torch.full_like(sides, value)
    assert by_hand(probe(), broken, broken) == 0


def classified(batches: list[Output], **settings: object) -> float | Tensor:
    metric = ClassificationAccuracy(**settings)
    for batch in batches:
        metric.update(batch)
    return metric.compute()


def make_logits(count: int = 60, classes: int = 5) -> Output:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes - 1, (count,), generator=generator)  # none of the last class
    labels[::7] = -100
    return {"logits": torch.randn(count, classes, generator=generator), "labels": labels}


@pytest.mark.parametrize("top", [1, 3, 9])
def test_accuracy_equals_a_loop_over_the_labelled_samples(top):
    samples = make_logits()
    hits: dict[int, list[bool]] = {}
    for logits, label in zip(samples["logits"].tolist(), samples["labels"].tolist(), strict=True):
        if label >= 0:
            better = sum(value > logits[label] for value in logits)
            hits.setdefault(label, []).append(better < top)
    shares = {label: sum(own) / len(own) for label, own in hits.items()}
    everything = [hit for own in hits.values() for hit in own]
    batches = loader(samples)
    assert classified(batches, top=top) == sum(everything) / len(everything)
    assert classified(batches, top=top, average="classes") == pytest.approx(
        sum(shares.values()) / len(shares)
    )
    by_class = classified(batches, top=top, average=None)
    assert by_class[:4].tolist() == [shares[label] for label in range(4)]
    assert math.isnan(by_class[4])


@pytest.mark.parametrize("average", ["samples", "classes"])
def test_accuracy_over_uneven_and_empty_shards_is_that_of_one_process(ranks, average):
    batches = loader(make_logits())
    expected = classified(batches, average=average)
    for cut in (2, len(batches)):
        found = ranks.run(accuracy_of_shard, [(batches[:cut], average), (batches[cut:], average)])
        assert found == [expected] * 2


def accuracy_of_shard(batches: list[Output], average: str) -> float | Tensor:
    return classified(batches, average=average)


def test_a_label_that_is_no_class_is_reported_and_does_not_count(caplog):
    samples = make_logits()
    expected = classified([samples])
    samples["labels"][0] = 5
    assert classified([samples]) == expected
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "labels must be in [0, 5), or -100 for a sample without one, got 5" in record.message


def test_logits_that_are_missing_are_named():
    with pytest.raises(BatchError, match=r"logits must be \[B, C\], got none among features"):
        ClassificationAccuracy().update({"features": torch.ones(2, 3)})
    for settings, message in (({"top": 0}, "top must be"), ({"average": "macro"}, "average must")):
        with pytest.raises(ValueError, match=message):
            ClassificationAccuracy(**settings)


def test_the_bank_is_encoded_in_the_precision_of_the_queries():
    types = []

    def note(model: nn.Module, batch: Output) -> Output:
        features = model(batch["features"])
        types.append(features.dtype)
        return {"features": features, "labels": batch["labels"]}

    samples = loader(make_samples(8, 0))
    evaluator = Evaluator(
        nn.Linear(6, 4),
        task=note,
        metrics=[KNNAccuracy(samples, k=3)],
        precision="bf16",
        device="cpu",
    )
    evaluator.evaluate(samples)
    assert types == [torch.bfloat16, torch.bfloat16]


def test_a_bank_smaller_than_k_is_refused():
    with pytest.raises(BatchError, match="got k=200 and 40 rows"):
        by_hand(KNNAccuracy(), make_samples(40, 0), make_samples(3, 1))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"features": torch.ones(2, 3)}, "needs features and labels, got features"),
        ({"features": torch.ones(2), "labels": torch.ones(2).long()}, r"must be \[B, D\]"),
        ({"features": torch.ones(2, 3), "labels": torch.ones(2)}, r"integers \[2\]"),
        ({"features": torch.ones(2, 3), "labels": torch.ones(3).long()}, r"integers \[2\]"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(output, message):
    with pytest.raises(BatchError, match=message):
        KNNAccuracy().remember(output)


def test_what_was_not_fitted_or_saw_nothing_cannot_be_computed():
    with pytest.raises(NotComputableError, match="must fit its bank before"):
        KNNAccuracy(k=1).update(make_samples(3, 0))
    with pytest.raises(NotComputableError, match="must encode its prompts before"):
        ZeroShotAccuracy(["cat"], encode=encode).update(make_samples(3, 0))
    probe = KNNAccuracy(k=1)
    probe.remember(make_samples(3, 0))
    probe.fit()
    with pytest.raises(NotComputableError, match="needs at least one sample"):
        probe.compute()


def test_a_probe_without_a_bank_or_an_evaluator_raises():
    evaluator = Evaluator(Tower(), task=labelled, metrics=[KNNAccuracy(k=1)], device="cpu")
    with pytest.raises(ValueError, match="needs a bank of batches to learn from, got none"):
        evaluator.evaluate(loader(make_samples(3, 0)))
    engine = Engine(lambda *_: make_samples(3, 0))
    KNNAccuracy(loader(make_samples(3, 0)), k=1).attach(engine, "knn")
    with pytest.raises(TypeError, match="must be attached to an Evaluator"):
        engine.run([0])


def test_an_output_transform_adapts_the_outputs_of_another_task():
    metric = KNNAccuracy(
        [{"image": torch.eye(6), "label": torch.arange(6)}],
        k=1,
        output_transform=lambda o: {"features": o["logits"], "labels": o["labels"]},
    )
    evaluator = Evaluator(nn.Identity(), task=tasks.classification, metrics=[metric], device="cpu")
    batch = {"image": torch.eye(6) + 0.1, "label": torch.arange(6)}
    assert evaluator.evaluate([batch]) == {"knn_accuracy": 1.0}
