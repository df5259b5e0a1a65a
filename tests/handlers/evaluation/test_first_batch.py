"""The check of an evaluation's first batch: what it reports, and that it leaves no trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Accuracy, Metric, RunningAverage
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from diptych.engine import BatchError, CheckpointError, SeededLoader, Trainer, tasks
from diptych.handlers import (
    CheckpointManager,
    Curriculum,
    EarlyStopping,
    Evaluation,
    KNNAccuracy,
    LinearProbeAccuracy,
    RetrievalRecall,
    Stage,
    StagePlan,
    ZeroShotAccuracy,
)

Batch = dict[str, Tensor]


class Broken(nn.Module):
    """Multiplies sizes that do not fit, for which its inputs are not to blame."""

    def forward(self, image: Tensor) -> Tensor:
        return image.T @ torch.zeros(7)


def make_loader(samples: int = 12, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, generator=generator)
    labels = torch.arange(samples) % 2
    pairs = zip(images.split(4), labels.split(4), strict=True)
    return [{"image": image, "label": label} for image, label in pairs]


class Noisy(nn.Module):
    """Draws random numbers and counts its calls, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        np.random.rand()
        random.random()
        return self.linear(image) + 0.0 * torch.randn(len(image), 2)


def make_trainer(**settings: Any) -> Trainer:
    torch.manual_seed(1)
    model = Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"task": tasks.classification, "device": "cpu", "seed": 0, **settings}
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, **settings)


class Endless(IterableDataset[Batch]):
    """A data set without a length, and without a sample."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(())


class Picky(Metric):
    """A metric that refuses its batches, or cannot be computed from few."""

    def __init__(self, *, takes: bool) -> None:
        self.takes = takes
        super().__init__()

    def reset(self) -> None:
        self.seen = 0

    def update(self, output: tuple[Tensor, Tensor]) -> None:
        if not self.takes:
            raise BatchError("labels must be names")
        self.seen += len(output[1])

    def compute(self) -> float:
        if self.seen < 12:
            raise ZeroDivisionError
        return float(self.seen)


def without_label(model: nn.Module, batch: Batch) -> Batch:
    return {"features": model(batch["image"])}


BROKEN: dict[str, tuple[Callable[[], Evaluation], str]] = {
    "an empty list": (lambda: Evaluation([]), "at least one batch"),
    "a length of 0": (
        lambda: Evaluation(DataLoader(range(3), batch_size=4, drop_last=True)),
        "at least one batch",
    ),
    "no batch in the first pass": (
        lambda: Evaluation(DataLoader(Endless(), batch_size=None)),
        "at least one batch",
    ),
    "a missing key": (
        lambda: Evaluation([{"image": torch.randn(4, 3)}]),
        "batch must have 'label', got 'image'",
    ),
    "a metric that needs predictions": (
        lambda: Evaluation(make_loader(), metrics=[Accuracy()], task=without_label),
        "must return logits and labels, or y_pred and y, for the metrics accuracy, got features",
    ),
    "a metric of features": (
        lambda: Evaluation(make_loader(), metrics=[RetrievalRecall()]),
        "retrieval needs image_features",
    ),
    "a metric that refuses": (
        lambda: Evaluation(make_loader(), metrics=[Picky(takes=False)]),
        "labels must be names",
    ),
    "a bank of other features": (
        lambda: Evaluation(make_loader(), metrics=[KNNAccuracy(make_loader())]),
        "a probe needs features and labels",
    ),
}


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_reported_before_the_first_iteration(case, resumed, tmp_path):
    if resumed:
        trainer = make_trainer().attach(CheckpointManager(tmp_path))
        trainer.run(make_loader(), max_epochs=1)
    build, message = BROKEN[case]
    trainer = make_trainer()
    steps = []
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: steps.append(1))
    trainer.attach(build(), CheckpointManager(tmp_path))
    with pytest.raises(BatchError, match=rf"first batch of Evaluation\[val\].*{message}"):
        trainer.run(make_loader(), max_epochs=2)
    assert not steps


def test_a_metric_that_needs_predictions_is_refused_with_a_contrastive_task_when_attached():
    trainer = make_trainer(task=tasks.image_text)
    for metric in (Accuracy(), 1 - Accuracy()):
        message = "for the metrics score, got ImageText. Give the evaluation a task"
        with pytest.raises(BatchError, match=message):
            trainer.attach(Evaluation(make_loader(), metrics={"score": metric}, task=None))
    takes_features = Accuracy(lambda o: (o["image_features"], o["groups"]))
    trainer.attach(Evaluation(make_loader(), metrics={"score": takes_features}))


@pytest.mark.parametrize("own_generator", [False, True])
def test_the_check_changes_no_number_of_the_run(own_generator):
    def trained(*, check: bool) -> Trainer:
        samples = [{k: v[0] for k, v in batch.items()} for batch in make_loader(48)]
        generator = torch.Generator().manual_seed(3) if own_generator else None
        shuffled = DataLoader(samples, batch_size=5, shuffle=True, generator=generator)
        seeded = SeededLoader(samples, batch_size=4)
        trainer = make_trainer()
        trainer.attach(
            Evaluation(shuffled, metrics=[Accuracy()], check_first_batch=check),
            Evaluation(seeded, metrics=[Accuracy()], prefix="seen", check_first_batch=check),
        )
        trainer.run(seeded, max_epochs=2)
        return trainer

    bare, checked = trained(check=False), trained(check=True)
    for name, value in bare.model.state_dict().items():
        assert torch.equal(checked.model.state_dict()[name], value), name
    assert checked.metrics.state_dict()["history"] == bare.metrics.state_dict()["history"]


def test_the_check_leaves_generators_modes_metrics_and_loaders_as_they_were():
    samples = [{k: v[0] for k, v in batch.items()} for batch in make_loader(48)]
    loader = SeededLoader(samples, batch_size=4)
    reader = iter(loader)
    next(reader)
    trainer, accuracy = make_trainer(), Accuracy()
    trainer.model.linear.eval()
    evaluation = Evaluation(loader, metrics={"error": 1 - accuracy})
    trainer.attach(evaluation)
    accuracy.update((torch.eye(2), torch.tensor([0, 0])))
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    events = []
    for event in (Events.STARTED, Events.ITERATION_COMPLETED):
        evaluation.evaluator.add_event_handler(event, lambda: events.append(1))
    assert evaluation.check(trainer) == {"val/error", "val/loss"}
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert loader.state_dict()["batch"] == 1
    assert len(list(reader)) == len(loader) - 1
    assert accuracy.compute() == 0.5
    assert trainer.model.training
    assert not trainer.model.linear.training
    assert not events
    assert evaluation.values == trainer.state.metrics == {}
    assert trainer.model.calls == 0


def test_a_metric_that_needs_the_whole_data_passes_the_check():
    trainer = make_trainer()
    evaluation = Evaluation(make_loader(), metrics={"all": Picky(takes=True)})
    trainer.attach(evaluation)
    assert evaluation.check(trainer) is None  # the names are not known
    trainer.run(make_loader(), max_epochs=1)
    assert evaluation.values["val/all"] == 12.0


def test_a_probe_is_checked_with_one_batch_of_its_bank():
    read, encoded = [], []

    class Bank(list):
        def __iter__(self) -> Iterator[Batch]:
            for batch in list.__iter__(self):
                read.append(1)
                yield batch

    def labelled(model: nn.Module, batch: Batch) -> Batch:
        return {"features": model(batch["image"]), "labels": batch["label"]}

    def encode(_: nn.Module, prompts: list[str]) -> Tensor:
        encoded.extend(prompts)
        return torch.eye(2)[: len(prompts)]

    metrics = [
        KNNAccuracy(Bank(make_loader()), k=12),
        LinearProbeAccuracy(Bank(make_loader())),
        ZeroShotAccuracy(["a", "b"], encode=encode),
    ]
    trainer = make_trainer()
    evaluation = Evaluation(make_loader(), metrics=metrics, task=labelled)
    trainer.attach(evaluation)
    evaluation.check(trainer)
    assert (len(read), encoded) == (2, ["a"])
    trainer.run(make_loader(), max_epochs=1)
    assert {"val/knn_accuracy", "val/zero_shot_accuracy"} <= set(evaluation.values)
    assert len(read) == 2 + 6


def test_each_run_of_one_process_is_checked_once_and_a_new_loader_again():
    trainer, calls = make_trainer(), []

    def task(model: nn.Module, batch: Batch) -> Batch:
        calls.append(len(batch["label"]))
        return tasks.classification(model, batch)

    evaluation = Evaluation(make_loader(4), task=task, loss=False, every=1000)
    trainer.attach(evaluation)
    trainer.run(make_loader(), max_epochs=1)
    trainer.run(make_loader(), max_epochs=2)
    assert calls == [4]
    evaluation.loader = make_loader(1)
    trainer.run(make_loader(), max_epochs=3)
    assert calls == [4, 1]


def test_an_evaluation_at_the_start_needs_no_check():
    trainer, calls = make_trainer(), []

    def task(model: nn.Module, batch: Batch) -> Batch:
        calls.append(trainer.state.iteration)
        return tasks.classification(model, batch)

    trainer.attach(Evaluation(make_loader(4), task=task, at_start=True))
    trainer.run(make_loader(), max_epochs=1)
    assert calls == [0, 3]


def test_a_metric_that_nothing_publishes_is_reported_before_the_first_iteration():
    for evaluations in ([], [Evaluation(make_loader(), metrics=[Accuracy()])]):
        trainer = make_trainer().attach(EarlyStopping(metric="val/acuracy"), *evaluations)
        with pytest.raises(KeyError, match="got 'val/acuracy'; there are train/loss"):
            trainer.run(make_loader(), max_epochs=1)
        assert trainer.state.iteration == 0


def test_the_name_that_other_trainers_give_a_validation_loss_is_reported_too():
    trainer = make_trainer().attach(EarlyStopping(metric="val_loss"), Evaluation(make_loader()))
    with pytest.raises(KeyError, match="got 'val_loss'; there are train/loss, val/loss"):
        trainer.run(make_loader(), max_epochs=1)
    assert trainer.state.iteration == 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes from 3.11 on")
def test_an_error_of_torch_says_which_evaluation_has_raised_it():
    trainer = make_trainer()
    trainer.attach(Evaluation(make_loader(), model=Broken(), prefix="wide"))
    with pytest.raises(RuntimeError, match="size mismatch") as raised:
        trainer.run(make_loader(), max_epochs=1)
    notes = " ".join(raised.value.__notes__)
    assert "Evaluation[wide]" in notes
    assert "the model (Broken) was called with float32 [4, 3]" in notes


def test_an_evaluation_batch_that_the_model_cannot_take_is_named():
    trainer = make_trainer()
    wide = [{"image": torch.randn(4, 5), "label": torch.zeros(4, dtype=torch.int64)}]
    trainer.attach(Evaluation(wide, prefix="wide"))
    with pytest.raises(BatchError, match=r"Evaluation\[wide\]: batch\['image'\] must have 3"):
        trainer.run(make_loader(), max_epochs=1)


def test_a_best_value_that_is_not_published_says_how_to_publish_it(tmp_path):
    trainer = make_trainer().attach(CheckpointManager(tmp_path, best="own"))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda t: t.state.metrics.update(own=1.0))
    with pytest.raises(CheckpointError, match=r"alone\. Publish it with trainer\.metrics"):
        trainer.run(make_loader(), max_epochs=1)


class OfEachClass(Metric):
    """The number of samples of each class that occurs."""

    def reset(self) -> None:
        self.counts: dict[str, float] = {}

    def update(self, output: tuple[Tensor, Tensor]) -> None:
        for label in output[1].tolist():
            self.counts[f"class_{label}"] = self.counts.get(f"class_{label}", 0.0) + 1

    def compute(self) -> dict[str, float]:
        return dict(self.counts)


def test_names_that_depend_on_the_data_are_not_known_at_the_start():
    batches = make_loader()
    batches[0]["label"] = torch.zeros(4, dtype=torch.int64)  # no sample of class 1
    trainer = make_trainer()
    stopping = EarlyStopping(metric="val/class_1")
    trainer.attach(Evaluation(batches, metrics=[OfEachClass()]), stopping)
    trainer.run(make_loader(), max_epochs=1)
    assert stopping.best == 4.0


def test_a_function_of_the_user_may_publish_what_the_start_does_not_know():
    trainer = make_trainer()
    stopping = EarlyStopping(metric="val/own", patience=1)
    trainer.attach(stopping, Evaluation(make_loader()))
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda t: t.metrics.update({"val/own": -t.state.epoch})
    )
    trainer.run(make_loader(), max_epochs=9)
    assert (stopping.best, trainer.state.epoch) == (-1.0, 2)


def test_a_curriculum_whose_metric_nothing_publishes_is_reported_too():
    trainer = make_trainer()
    curriculum = Curriculum("loss.label_smoothing", end=0.1, metric="val/acuracy", above=0.5)
    trainer.attach(curriculum, Evaluation(make_loader(), metrics=[Accuracy()]))
    with pytest.raises(KeyError, match="got 'val/acuracy'; there are train/loss, val/accuracy"):
        trainer.run(make_loader(), max_epochs=1)
    assert trainer.state.iteration == 0


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_the_first_batch_is_tried_with_the_task_of_the_first_stage(first):
    def pairs(model: nn.Module, batch: Batch) -> Batch:
        return {"logits": model(batch["picture"]), "labels": batch["label"]}

    batches = [{"picture": batch["image"], "label": batch["label"]} for batch in make_loader()]
    trainer = make_trainer()  # its own task wants an image
    plan = StagePlan([Stage("only", epochs=1, lr=0.1, task=pairs)])
    evaluation = Evaluation(batches, metrics=[Accuracy()])
    stopping = EarlyStopping(metric="val/accuracy")
    trainer.attach(*((evaluation, stopping, plan) if first else (plan, stopping, evaluation)))
    trainer.run(batches)
    assert evaluation.check(trainer) == {"val/accuracy", "val/loss"}
    assert stopping.best is not None


def test_a_metric_that_is_computed_in_each_iteration_is_tried_too():
    trainer = make_trainer()
    share = RunningAverage(output_transform=lambda outputs: outputs["labels"].float().mean())
    trainer.attach(Evaluation(make_loader(), metrics={"share": share}))
    trainer.run(make_loader(), max_epochs=1)
    assert trainer.state.metrics["val/share"] == 0.5
