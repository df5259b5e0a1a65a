"""Evaluations: when they run, what they publish, and that they do not change the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Accuracy, ConfusionMatrix, EpochMetric, Metric, VariableAccumulation
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from diptych.engine import BatchError, EvaluationEvents, MetricsEvents, Trainer, tasks
from diptych.handlers.evaluation import evaluation
from diptych.handlers.evaluation.evaluation import Evaluation, ValidationLoss

Batch = dict[str, Tensor]


class Queueing(nn.Module):
    """Counts the samples it has seen in training mode, as a queue of negatives stores them."""

    couples_samples = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.training:
            self.seen += len(labels)
        return F.cross_entropy(logits, labels)


class WeightedMean(nn.Module):
    """A mean over the samples whose label is not 0."""

    couples_samples = False

    def total_and_weight(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        weights = (labels > 0).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses * weights).sum(), weights.sum()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        total, weight = self.total_and_weight(logits, labels)
        return total / weight


def make_loader(samples: int = 10, size: int = 4, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, generator=generator)
    labels = torch.randint(0, 2, (samples,), generator=generator)
    parts = zip(images.split(size), labels.split(size), strict=True)
    return [{"image": image, "label": label} for image, label in parts]


def make_trainer(loss: nn.Module | None = None) -> Trainer:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    loss = Queueing() if loss is None else loss
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    return Trainer(model, loss, optimizer, task=tasks.classification, device="cpu", log_every=2)


def accuracy() -> dict[str, Metric]:
    return {"accuracy": Accuracy(output_transform=lambda o: (o["logits"], o["labels"]))}


def note_records(trainer: Trainer) -> list[tuple[int, set[str]]]:
    records: list[tuple[int, set[str]]] = []

    def note() -> None:
        record = trainer.metrics.record
        if any(not tag.startswith("train/") for tag in record.values):
            records.append((record.step, set(record.values)))

    trainer.add_event_handler(MetricsEvents.LOGGED, note)
    return records


def test_values_reach_state_history_and_sinks_before_evaluated_fires():
    trainer = make_trainer()
    records = note_records(trainer)
    seen = []
    trainer.add_event_handler(
        EvaluationEvents.EVALUATED,
        lambda: seen.append((trainer.state.iteration, trainer.state.metrics["val/accuracy"])),
    )
    evaluation = Evaluation(make_loader(seed=1), metrics=accuracy())
    trainer.attach(evaluation).run(make_loader(), max_epochs=2)
    assert records == [(3, {"val/accuracy", "val/loss"}), (6, {"val/accuracy", "val/loss"})]
    assert seen == list(zip([3, 6], trainer.metrics.get_history("val/accuracy"), strict=True))
    assert evaluation.values["val/loss"] == trainer.state.metrics["val/loss"]


def test_each_evaluation_has_its_own_prefix_and_cadence():
    trainer = make_trainer()
    records = note_records(trainer)
    trainer.attach(
        Evaluation(make_loader(), every=2, loss=False, metrics=accuracy(), prefix="seen"),
        Evaluation(make_loader(seed=1), prefix="unseen"),
    )
    trainer.run(make_loader(), max_epochs=2)
    seen, unseen = {"seen/accuracy"}, {"unseen/loss"}
    assert records == [(2, seen), (3, unseen), (4, seen), (6, seen), (6, unseen)]


def test_a_resumed_run_is_not_evaluated_at_its_start_again():
    trainer = make_trainer()
    records = note_records(trainer)
    trainer.attach(Evaluation(make_loader(), at_start=True, every=100))
    trainer.run(make_loader(), max_epochs=1)
    trainer.run(make_loader(), max_epochs=2)
    assert records == [(0, {"val/loss"})]


def test_the_loss_is_the_mean_over_samples_in_eval_mode():
    trainer = make_trainer()
    loader = make_loader(samples=10, size=4, seed=1)  # a last batch of two
    values = Evaluation(loader)
    trainer.attach(values)
    trainer.run(make_loader(), max_epochs=1)
    trainer.model.eval()
    logits = trainer.model(torch.cat([batch["image"] for batch in loader]))
    expected = F.cross_entropy(logits, torch.cat([batch["label"] for batch in loader]))
    assert values.values["val/loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_weighs_samples_as_it_does_in_training():
    trainer = make_trainer(WeightedMean())
    loader = make_loader(samples=9, size=2, seed=1)
    evaluation = Evaluation(loader)
    trainer.attach(evaluation)
    trainer.run(make_loader(), max_epochs=1)
    trainer.model.eval()
    whole = {key: torch.cat([batch[key] for batch in loader]) for key in loader[0]}
    expected = trainer.loss(trainer.model(whole["image"]), whole["label"])
    assert evaluation.values["val/loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_a_queue_stores_nothing_and_every_module_keeps_its_mode():
    trainer = make_trainer()
    trainer.model[2].eval()
    trainer.attach(Evaluation(make_loader(samples=40), every=1))
    modes = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def note_modes() -> None:
        modes.append([part.training for part in (*trainer.model, trainer.loss)])

    trainer.run(make_loader(), max_epochs=1)
    assert trainer.loss.seen == 10
    assert modes == [[True, True, False, True, True]] * 3


class Scaled(nn.Module):
    """Cross entropy, times a factor."""

    couples_samples = False

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.factor * F.cross_entropy(logits, labels)


def test_a_replaced_loss_or_task_is_evaluated_from_then_on():
    trainer, evaluation = make_trainer(Scaled(1.0)), Evaluation(make_loader())
    trainer.attach(evaluation)
    before = evaluation.evaluate(trainer)["val/loss"]
    trainer.loss = Scaled(3.0)
    assert evaluation.evaluate(trainer)["val/loss"] == pytest.approx(3 * before)

    def inverted(model: nn.Module, batch: Batch) -> Batch:
        outputs = tasks.classification(model, batch)
        return {"logits": outputs["logits"], "labels": 1 - outputs["labels"]}

    trainer.task = inverted
    expected = 3 * F.cross_entropy(*inverted_logits(trainer.model, make_loader()))
    assert evaluation.evaluate(trainer)["val/loss"] == pytest.approx(float(expected))


def inverted_logits(model: nn.Module, loader: list[Batch]) -> tuple[Tensor, Tensor]:
    model.eval()
    with torch.no_grad():
        logits = model(torch.cat([batch["image"] for batch in loader]))
    return logits, 1 - torch.cat([batch["label"] for batch in loader])


def test_an_evaluation_with_another_task_publishes_no_loss():
    def halves(model: nn.Module, batch: Batch) -> Batch:
        return {"logits": model(batch["image"]) / 2, "labels": batch["label"]}

    trainer = make_trainer()
    evaluation = Evaluation(make_loader(), task=halves, metrics=accuracy())
    trainer.attach(evaluation).run(make_loader(), max_epochs=1)
    assert list(evaluation.values) == ["val/accuracy"]


def test_another_model_is_evaluated_instead_of_the_trainers():
    other = nn.Linear(3, 2)
    trainer = make_trainer()
    evaluation = Evaluation(make_loader(), model=other, prefix="averaged")
    trainer.attach(evaluation).run(make_loader(), max_epochs=1)
    whole = {key: torch.cat([batch[key] for batch in make_loader()]) for key in ("image", "label")}
    expected = F.cross_entropy(other(whole["image"]), whole["label"])
    assert evaluation.values["averaged/loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert other.training


class Halved:
    """Imitates a handler that averages weights: its average is half of them."""

    def attach(self, trainer: Trainer) -> None:
        self.model = trainer.model

    @contextmanager
    def averaged(self) -> Iterator[None]:
        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.5)
        try:
            yield
        finally:
            self.model.load_state_dict(kept)


def loss_of(model: nn.Module) -> float:
    whole = {key: torch.cat([b[key] for b in make_loader(seed=1)]) for key in ("image", "label")}
    return F.cross_entropy(model.eval()(whole["image"]), whole["label"]).item()


def test_averaged_weights_are_evaluated_if_there_are_any_and_the_trained_ones_restored():
    bare, trainer = make_trainer(), make_trainer()
    average = Halved()
    own, others = make_loader(seed=1), nn.Linear(3, 2)
    trainer.attach(
        average,
        Evaluation(own, every=1, at_start=True),
        Evaluation(own, every=1, prefix="plain", weights="model"),
        Evaluation(own, every=1, prefix="other", model=others),
    )
    for one in (bare, trainer):
        torch.manual_seed(3)  # of the dropout
        one.run(make_loader(), max_epochs=1)
    for name, value in bare.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    values = trainer.state.metrics
    assert values["plain/loss"] == pytest.approx(loss_of(trainer.model), rel=1e-6)
    assert values["other/loss"] == pytest.approx(loss_of(others), rel=1e-6)
    with average.averaged():
        assert values["val/loss"] == pytest.approx(loss_of(trainer.model), rel=1e-6)
    assert values["val/loss"] != pytest.approx(values["plain/loss"], rel=1e-3)


def test_two_averages_of_the_weights_are_refused():
    trainer = make_trainer().attach(Halved(), Halved(), Evaluation(make_loader(), every=1))
    with pytest.raises(ValueError, match="average the weights must be at most one, got 2"):
        trainer.run(make_loader(), max_epochs=1)


def test_two_evaluations_of_one_prefix_are_refused():
    trainer = make_trainer().attach(Evaluation(make_loader()))
    with pytest.raises(ValueError, match=r"prefix must be different for each .*'val' twice"):
        trainer.attach(Evaluation(make_loader(seed=1)))


def test_a_metric_called_loss_beside_the_loss_is_refused():
    metrics = {"loss": accuracy()["accuracy"]}
    with pytest.raises(ValueError, match="must not have the name 'loss'"):
        make_trainer().attach(Evaluation(make_loader(), metrics=metrics))
    make_trainer().attach(Evaluation(make_loader(), metrics=metrics, loss=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be 'epoch' or a number of iterations >= 1, got 0"),
        ({"every": "step"}, "got 'step'"),
        ({"prefix": ""}, "prefix must be a name"),
        ({"prefix": "val/"}, "got 'val/'"),
        ({"prefix": "train"}, "not 'train'"),
        ({"weights": "ema"}, "weights must be one of average, model, got 'ema'"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(make_loader(), **arguments)


def test_a_loader_that_can_be_iterated_only_once_is_refused():
    with pytest.raises(TypeError, match="can be iterated again for each evaluation"):
        Evaluation(iter([{}]))


@pytest.mark.parametrize(
    ("prefix", "held_out", "told"), [("val", 0, True), ("train_data", 0, False), ("val", 1, False)]
)
def test_an_evaluation_on_the_training_data_is_logged_unless_its_name_says_so(
    prefix, held_out, told, caplog
):
    data = [batch for batch in make_loader() for _ in range(2)]
    loaders = [DataLoader(data, batch_size=None), DataLoader(list(data), batch_size=None)]
    trainer = make_trainer().attach(Evaluation(loaders[held_out], prefix=prefix))
    trainer.run(DataLoader(data, batch_size=None), max_epochs=1)
    assert ("reads the data that the run trains on" in caplog.text) == told


def evaluate_shard(loss: nn.Module, sizes: list[int], start: int) -> float:
    metric = ValidationLoss(loss, "fp32", torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(30, 2, generator=generator), torch.arange(30) % 2
    for size in sizes:
        part = slice(start, start + size)
        metric.update({"logits": logits[part], "labels": labels[part]})
        start += size
    return metric.compute()


def test_the_mean_over_samples_of_uneven_shards_is_that_of_one_process(ranks):
    expected = evaluate_shard(WeightedMean(), [18], 0)
    shards = [(WeightedMean(), [5, 2], 0), (WeightedMean(), [4, 4, 3], 7)]
    assert ranks.run(evaluate_shard, shards) == pytest.approx([expected] * 2, rel=1e-6)
    # A loss that declares nothing is treated as a mean over its samples.
    expected = evaluate_shard(nn.CrossEntropyLoss(), [18], 0)
    shards = [(nn.CrossEntropyLoss(), *shard) for _, *shard in shards]
    assert ranks.run(evaluate_shard, shards) == pytest.approx([expected] * 2, rel=1e-6)


def test_a_loss_that_couples_samples_is_averaged_over_ranks(ranks):
    # Ranks of one size: the average of their shares is the mean over all samples.
    expected = evaluate_shard(Queueing().eval(), [12], 0)
    shards = [(Queueing().eval(), [4, 2], start) for start in (0, 6)]
    assert ranks.run(evaluate_shard, shards) == pytest.approx([expected] * 2, rel=1e-6)


def error_of(trainer: Trainer, evaluation: Evaluation) -> str:
    """Return the message of the error that an evaluation raises, if any."""
    trainer.attach(evaluation)
    try:
        evaluation.evaluate(trainer)
    except BatchError as error:
        return str(error)
    return ""


def evaluate_coupled(batches: int, seed: int) -> str:
    model, loss = nn.Linear(3, 2), Queueing()
    optimizer = torch.optim.SGD(model.parameters())
    trainer = Trainer(  # its step is never run
        model, loss, optimizer, task=tasks.classification, device="cpu", step=lambda *_: None
    )
    return error_of(trainer, Evaluation(make_loader(samples=4 * batches, seed=seed)))


def test_ranks_with_different_numbers_of_batches_raise_instead_of_waiting(ranks):
    for message in ranks.run(evaluate_coupled, [(2, 0), (3, 1)]):
        assert "as many batches on every rank" in message
        assert "got [2, 3]" in message
    assert ranks.run(evaluate_coupled, [(2, 0), (2, 1)]) == ["", ""]


def evaluate_shards(seed: int) -> str:
    return error_of(make_trainer(Scaled(1.0)), Evaluation(make_loader(seed=seed)))


def test_ranks_that_evaluate_the_same_samples_raise(ranks):
    for message in ranks.run(evaluate_shards, [(0,), (0,)]):
        assert "got the same first batch on ranks 0 and 1" in message
        assert "of_this_rank" in message
    assert ranks.run(evaluate_shards, [(0,), (1,)]) == ["", ""]


def test_a_loader_of_unknown_length_may_be_shared_by_ranks(monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(4))

    gathered = []
    monkeypatch.setattr(evaluation, "world_size", lambda: 2)
    monkeypatch.setattr(evaluation, "has_shards", lambda _: True)
    monkeypatch.setattr(evaluation, "gather_values", lambda own: gathered.append(own) or [own, own])

    handler = Evaluation(torch.utils.data.DataLoader(Stream(), batch_size=2))
    handler._check_length(make_trainer(Scaled(1.0)))

    assert gathered == [None]


def test_a_result_that_is_not_one_number_is_in_the_state_whatever_its_type():
    trainer = make_trainer()

    def first(outputs: Batch) -> tuple[Tensor, Tensor]:
        return outputs["logits"], outputs["labels"]

    metrics = {
        "matrix": ConfusionMatrix(2, output_transform=first),
        "sum": VariableAccumulation(
            lambda held, more: held + more, lambda o: o["labels"].double().sum()
        ),
        "text": EpochMetric(lambda *_: "as text", first, check_compute_fn=False),
    }
    trainer.attach(Evaluation(make_loader(), metrics=metrics))
    trainer.run(make_loader(), max_epochs=1)
    found, labels = trainer.state.metrics, torch.cat([b["label"] for b in make_loader()])
    assert found["val/matrix"].sum() == 10
    assert found["val/sum"] == (labels.sum(), 3)  # of batches
    assert found["val/text"] == "as text"
