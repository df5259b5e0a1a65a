"""Linear probes: the fitted head is the minimum, and the online head does not change the run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Events
from ignite.exceptions import NotComputableError
from torch import Tensor, nn

from diptych.engine import BatchError, Evaluator, MetricsEvents, SeededLoader, Trainer, tasks
from diptych.handlers.evaluation import linear_probes, probes
from diptych.handlers.evaluation.linear_probes import LinearProbeAccuracy, OnlineLinearProbe

Output = dict[str, Tensor]


def make_samples(count: int, seed: int, *, noise: float = 1.0) -> Output:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(4, (count,), generator=generator)
    features = centres[labels] + noise * torch.randn(count, 6, generator=generator)
    return {"features": features, "labels": labels}


def fitted(bank: Output | None, **settings: float) -> LinearProbeAccuracy:
    probe = LinearProbeAccuracy(**settings)
    if bank is not None:
        probe.remember(bank)
    probe.fit()
    return probe


def objective(head: Tensor, bank: Output, l2: float) -> Tensor:
    """Return the mean cross entropy and the penalty in float64, as the docstring defines them."""
    unit = F.normalize(bank["features"].double(), dim=1)
    standard = (unit - unit.mean(0)) / unit.std(0, correction=0)
    logits = standard @ head[:-1] + head[-1]
    return F.cross_entropy(logits, bank["labels"]) + l2 / 2 * head[:-1].square().sum()


@pytest.mark.parametrize("l2", [1e-3, 0.1])
@pytest.mark.parametrize("rows", [7, 8192])
def test_no_step_in_any_direction_improves_the_fitted_head(monkeypatch, l2, rows):
    monkeypatch.setattr(linear_probes, "ROWS", rows)
    bank = make_samples(80, 0)
    head = fitted(bank, l2=l2)._head.double().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(head, bank, l2), head)
    at_zero = torch.zeros_like(head).requires_grad_()
    (start,) = torch.autograd.grad(objective(at_zero, bank, l2), at_zero)
    assert gradient.norm() < 1e-4 * start.norm()


def test_equal_banks_give_equal_heads_and_no_random_number_is_drawn():
    before = torch.get_rng_state()
    first, second = (fitted(make_samples(60, 0))._head for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_constant_dimension_leaves_the_head_finite():
    bank = make_samples(60, 0)
    bank["features"] = F.pad(F.normalize(bank["features"], dim=1), (0, 2), value=1.0)
    assert torch.isfinite(fitted(bank)._head).all()


def test_well_separated_classes_are_classified_in_an_evaluation():
    bank, queries = make_samples(80, 0, noise=0.1), make_samples(30, 1, noise=0.1)
    evaluator = Evaluator(
        nn.Identity(),
        task=lambda _, batch: batch,
        metrics=[LinearProbeAccuracy([bank])],
        device="cpu",
    )
    assert evaluator.evaluate([queries]) == {"linear_probe_accuracy": 1.0}
    shuffled = {**bank, "labels": bank["labels"].roll(1)}
    chance = LinearProbeAccuracy()
    chance.remember(shuffled)
    chance.fit()
    chance.update(queries)
    assert chance.compute() < 0.6


def head_of_shard(bank: Output | None) -> Tensor:
    head = fitted(bank, l2=0.01)._head
    assert head is not None
    return head


@pytest.mark.parametrize("cut", [20, 80])
def test_uneven_shards_give_the_head_of_one_process(ranks, cut):
    bank = make_samples(80, 0)
    shards = [
        ({name: value[part] for name, value in bank.items()} if cut < 80 else whole,)
        for part, whole in ((slice(cut), bank), (slice(cut, 80), None))
    ]
    first, second = ranks.run(head_of_shard, shards)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, head_of_shard(bank), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"l2": -1.0}, "l2 must be >= 0, got -1.0"), ({"iterations": 0}, "iterations must be >= 1")],
)
def test_an_argument_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearProbeAccuracy(**settings)


def test_a_bank_that_cannot_be_fitted_is_refused():
    for bank in (None, {"features": torch.ones(2, 3), "labels": torch.tensor([-100, -100])}):
        with pytest.raises(NotComputableError, match="a bank with at least one labelled sample"):
            fitted(bank)
    with pytest.raises(NotComputableError, match="must fit its bank before it predicts"):
        LinearProbeAccuracy().update(make_samples(3, 0))


class Samples(torch.utils.data.Dataset[Output]):
    """Two views of points of four classes, which the views show."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Output:
        label = index % 4
        views = F.one_hot(torch.tensor(label), 4).repeat(2, 1) + 0.1 * torch.randn(2, 4)
        return {"image": views[0], "text": views[1], "label": torch.tensor(label)}


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1))
        self.text = nn.Linear(4, 8)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


class Distance(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).square().mean()


def make_trainer(*, image_text: bool = True, **settings: object) -> Trainer:
    torch.manual_seed(0)
    model = TwoTowers()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return Trainer(
        model,
        Distance(),
        optimizer,
        task=tasks.image_text,
        device="cpu",
        seed=1,
        log_every=4,
        **settings,
    )


def run(trainer: Trainer, epochs: int = 4) -> list[dict[str, float]]:
    records: list[dict[str, float]] = []
    trainer.add_event_handler(
        MetricsEvents.LOGGED, lambda: records.append(trainer.metrics.record.values)
    )
    trainer.run(SeededLoader(Samples(), 12, seed=2), max_epochs=epochs)
    return records


@pytest.mark.parametrize("microbatch_size", [None, 5])
def test_the_online_head_learns_and_does_not_change_the_model(microbatch_size):
    bare = make_trainer(microbatch_size=microbatch_size)
    run(bare)
    trainer = make_trainer(microbatch_size=microbatch_size).attach(OnlineLinearProbe(classes=4))
    records = run(trainer)
    first, last = records[0], records[-1]
    assert last["train/linear_probe_accuracy"] > 0.9
    assert last["train/linear_probe_loss"] < first["train/linear_probe_loss"]
    for name, value in bare.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name


def test_a_batch_is_scored_before_the_head_learns_from_it():
    trainer = make_trainer().attach(OnlineLinearProbe(classes=4))
    values = []

    @trainer.on(Events.ITERATION_COMPLETED(once=1))
    def read() -> None:
        trainer.metrics.log(1)
        values.append(trainer.metrics.record.values["train/linear_probe_loss"])

    run(trainer, epochs=1)
    assert values == [pytest.approx(torch.log(torch.tensor(4.0)).item())]


def test_labels_come_from_a_function_and_some_may_be_missing():
    seen = []

    def every_other(batch: Output) -> Tensor:
        labels = batch["label"].clone()
        labels[::2] = -100
        seen.append(labels)
        return labels

    probe = OnlineLinearProbe(classes=4, labels=every_other, features="text_features")
    records = run(make_trainer().attach(probe))
    assert len(seen) == 32
    assert records[-1]["train/linear_probe_accuracy"] > 0.9


def trained_head(batches: list[Output]) -> tuple[Tensor, dict[str, float]]:
    """Return the head and the values of an epoch, on features that stay as they are."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    trainer = Trainer(
        model,
        Distance(),
        torch.optim.SGD(model.parameters(), lr=0.0),
        task=lambda model, batch: {"features": model(batch["image"]), "other": batch["other"]},
        device="cpu",
        seed=0,
    )
    probe = OnlineLinearProbe(classes=3, features="features")
    trainer.attach(probe)
    trainer.run(batches, max_epochs=1)
    values = {name: value for name, value in trainer.state.metrics.items() if "probe" in name}
    return probe.head.weight.detach(), values


def test_the_online_head_and_its_values_do_not_depend_on_the_number_of_ranks(ranks):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for labels in ([0, 1, 2, -100, 1, 2], [-100, -100, 1, 0, -100, 2], [-100] * 6):
        rows = {"image": torch.randn(6, 4, generator=generator), "other": torch.zeros(6, 3)}
        batches.append({**rows, "label": torch.tensor(labels)})
    weights, values = trained_head(batches)
    shards = [
        [{name: value[part] for name, value in batch.items()} for batch in batches]
        for part in (slice(2), slice(2, 6))
    ]
    for found, same in ranks.run(trained_head, [(shard,) for shard in shards]):
        torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-7)
        assert same == pytest.approx(values, rel=1e-5)


def test_values_are_means_over_the_labelled_samples():
    rows = {"image": torch.randn(6, 4), "other": torch.zeros(6, 3)}
    labels = ([0, 0, 1, -100, 1, 2], [-100] * 6)  # the head predicts class 0 before it has learned
    once = trained_head([{**rows, "label": torch.tensor(labels[0])}])[1]
    assert once["train/linear_probe_accuracy"] == pytest.approx(2 / 5)
    both = trained_head([{**rows, "label": torch.tensor(own)} for own in labels])[1]
    assert both == pytest.approx(once)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_an_error_in_the_log_and_the_run_goes_on(caplog, label):
    rows = {"image": torch.randn(6, 4), "other": torch.zeros(6, 3)}
    first, second = ([0, 1, 2, label, 1, 0], [0, 1, 2, -100, 1, 0])
    weights, values = trained_head([{**rows, "label": torch.tensor(first)}] * 2)
    (record,) = [one for one in caplog.records if one.levelname == "ERROR"]
    assert "OnlineLinearProbe: labels must be in [0, 3), or -100" in record.message
    assert f"got {label}." in record.message
    expected, same = trained_head([{**rows, "label": torch.tensor(second)}] * 2)
    assert torch.equal(weights, expected)
    assert values == same


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_count_like_samples_without_a_label(value):
    rows = {"image": torch.randn(6, 4), "other": torch.zeros(6, 3)}
    broken = {**rows, "image": rows["image"].index_fill(0, torch.tensor([1, 4]), value)}
    labels = [torch.tensor(own) for own in ([0, 1, 2, 0, 1, 2], [0, -100, 2, 0, -100, 2])]
    weights, values = trained_head([{**one, "label": labels[0]} for one in (rows, broken)])
    expected, same = trained_head([{**rows, "label": own} for own in labels])
    assert torch.equal(weights, expected)
    assert values == same


def test_a_head_continues_where_it_was_saved():
    probe = OnlineLinearProbe(classes=4)
    trainer = make_trainer().attach(probe)
    run(trainer, epochs=1)
    other = OnlineLinearProbe(classes=4)
    make_trainer().attach(other)
    other.load_state_dict(copy.deepcopy(probe.state_dict()))
    assert torch.equal(other.head.weight, probe.head.weight)
    for one in (probe, other):
        one._measure(trainer)
        one._learn(trainer)
    assert torch.equal(other.head.weight, probe.head.weight)
    assert OnlineLinearProbe(classes=4).state_dict() == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": "pixels"}, "got 'pixels' among image_features"),
        ({"labels": "kind"}, "got 'kind' among 'image', 'text', 'label'"),
        ({"labels": lambda batch: batch["label"].float()}, r"integers \[12\], got torch.float32"),
        ({"labels": lambda batch: batch["label"].tolist()}, r"a tensor of integers .*got a list"),
    ],
)
def test_missing_features_or_labels_are_named(settings, message):
    trainer = make_trainer().attach(OnlineLinearProbe(classes=4, **settings))
    with pytest.raises(BatchError, match=message):
        run(trainer, epochs=1)


def test_labelled_features_have_unit_length():
    features, _ = probes.labelled_features(make_samples(5, 0))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
