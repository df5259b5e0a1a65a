"""The evaluator: metrics over a loader that leave no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from ignite.metrics import (
    Accuracy,
    Average,
    ConfusionMatrix,
    Loss,
    Metric,
    TopKCategoricalAccuracy,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diptych.engine import BatchError, Evaluator, tasks
from tests.engine.loop.loops import Unsized, call_at


def labelled(sizes: tuple[int, ...] = (5, 5, 2)) -> list[dict[str, Tensor]]:
    return [{"image": torch.randn(n, 4), "label": torch.randint(3, (n,))} for n in sizes]


def both(outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return outputs["logits"], outputs["labels"]


def evaluator_of(model: nn.Module | None = None, **settings: Any) -> Evaluator:
    model = nn.Linear(4, 3) if model is None else model
    settings = {"task": tasks.classification, "device": "cpu", **settings}
    return Evaluator(model, **settings)


class Several(Metric):
    """Computes a dictionary: the number of samples, and of batches."""

    def reset(self) -> None:
        self.samples = self.batches = 0

    def update(self, output: tuple[Tensor, Tensor]) -> None:
        self.samples += len(output[0])
        self.batches += 1

    def compute(self) -> dict[str, float]:
        return {"samples": self.samples, "batches": torch.tensor(self.batches)}


def test_the_values_are_those_of_a_plain_loop():
    model, loader = nn.Linear(4, 3), labelled()
    metrics = [Accuracy(both), Loss(nn.functional.cross_entropy, both), Several(both)]
    values = evaluator_of(model, metrics=metrics).evaluate(loader)
    images = torch.cat([batch["image"] for batch in loader])
    labels = torch.cat([batch["label"] for batch in loader])
    logits = model(images)
    assert values == pytest.approx(
        {
            "accuracy": (logits.argmax(1) == labels).double().mean().item(),
            "loss": nn.functional.cross_entropy(logits, labels).item(),
            "samples": 12.0,
            "batches": 3.0,
        }
    )
    assert all(type(value) is float for value in values.values())


def test_metrics_are_called_by_their_class_or_by_the_name_given():
    metrics = [TopKCategoricalAccuracy(2, both)]
    assert list(evaluator_of(metrics=metrics).evaluate(labelled())) == [
        "top_k_categorical_accuracy"
    ]
    named = {"top": Accuracy(both), "again": Accuracy(both)}
    assert list(evaluator_of(metrics=named).evaluate(labelled())) == ["top", "again"]


def test_the_chance_of_a_metric_that_knows_none_is_left_out():
    """Metrics of Ignite answer `chance`, like any other name, with a function."""
    evaluator = evaluator_of(metrics=[Several(both)])
    evaluator.evaluate(labelled())
    assert evaluator.chance == {}


def test_two_metrics_of_one_class_need_names():
    with pytest.raises(ValueError, match=r"different names, got accuracy twice\. Pass a mapping"):
        evaluator_of(metrics=[Accuracy(both), Accuracy(both)])


def test_two_metrics_that_give_one_name_are_a_clear_error():
    metrics = {"a": Several(both), "b": Several(both)}
    with pytest.raises(ValueError, match="different names, got batches, samples twice"):
        evaluator_of(metrics=metrics).evaluate(labelled())


@pytest.mark.parametrize("metrics", [[Accuracy], {"accuracy": len}])
def test_what_is_no_metric_is_refused(metrics):
    with pytest.raises(TypeError, match=r"must be an ignite\.metrics\.Metric, got"):
        evaluator_of(metrics=metrics)


def test_a_result_of_several_numbers_is_in_the_state_and_not_among_the_values():
    model, loader = nn.Linear(4, 3), labelled()
    evaluator = evaluator_of(model, metrics=[ConfusionMatrix(3), Accuracy()])
    values = evaluator.evaluate(loader)
    labels = torch.cat([batch["label"] for batch in loader])
    found = model(torch.cat([batch["image"] for batch in loader])).argmax(1)
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for label, prediction in zip(labels, found, strict=True):
        expected[label, prediction] += 1
    assert torch.equal(evaluator.state.metrics["confusion_matrix"], expected)
    assert values == {"accuracy": pytest.approx((labels == found).double().mean().item())}


class Modes(nn.Module):
    """Notes in which modes its parts run, and whether gradients are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.live = nn.Dropout(0.5).eval(), nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.seen: set[tuple[bool, ...]] = set()

    def forward(self, x: Tensor) -> Tensor:
        modules = (self, self.frozen, self.live)
        self.seen.add((*(m.training for m in modules), torch.is_grad_enabled()))
        return self.head(self.live(self.frozen(x)))


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_is_in_eval_mode_meanwhile_and_in_its_own_mode_afterwards(fails: bool):
    model = Modes()
    evaluator = evaluator_of(model)
    if fails:
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluator.evaluate(labelled())
    else:
        evaluator.evaluate(labelled())
    assert model.seen == {(False, False, False, False)}
    assert (model.training, model.frozen.training, model.live.training) == (True, False, True)


def test_the_random_generators_do_not_move():
    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    class Drawing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            draws()
            return super().forward(x)

    loader = DataLoader([{"image": torch.ones(4), "label": 1}] * 6, batch_size=2, shuffle=True)
    evaluator = evaluator_of(Drawing(4, 3), metrics=[Accuracy(both)])
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = draws()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    evaluator.evaluate(loader)
    assert draws() == expected


@pytest.mark.parametrize("empty", [[], Unsized([])])
def test_an_empty_loader_is_a_clear_error(empty):
    evaluator = evaluator_of(metrics=[Accuracy(both)])
    with pytest.raises(BatchError, match="at least one batch, got an empty loader"):
        evaluator.evaluate(empty)
    assert evaluator.evaluate(labelled())["accuracy"] >= 0


def test_each_evaluation_is_one_pass_over_its_own_loader():
    evaluator = evaluator_of(metrics=[Several(both)])
    for sizes in ((5, 5), (3,), (2, 2, 2), (4, 4)):
        for loader in (Unsized(labelled(sizes)), iter(labelled(sizes)), labelled(sizes)):
            values = evaluator.evaluate(loader)
            assert values == {"samples": sum(sizes), "batches": len(sizes)}


@pytest.mark.parametrize("where", ["task", "handler", "loader"])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_after_an_exception_the_next_evaluation_is_whole(where: str, kind: type[BaseException]):
    failing = [True]

    def fail(*_: Any) -> None:
        if failing and failing.pop():
            raise kind("broken")

    def task(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        if where == "task":
            fail()
        return tasks.classification(model, batch)

    class Loader(list):
        def __iter__(self):
            for index, batch in enumerate(super().__iter__()):
                if where == "loader" and index == 1:
                    fail()
                yield batch

    evaluator = evaluator_of(task=task, metrics=[Several(both)])
    if where == "handler":
        evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=2), fail)
    loader = Loader(labelled())
    with pytest.raises(kind, match="broken"):
        evaluator.evaluate(loader)
    assert evaluator.evaluate(loader) == {"samples": 12, "batches": 3}


def test_an_exception_handler_cannot_turn_a_failure_into_values():
    evaluator, raised = evaluator_of(metrics=[Several(both)]), []
    evaluator.evaluate(labelled())
    evaluator.add_event_handler(Events.EXCEPTION_RAISED, raised.append)
    evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluator.evaluate(labelled())
    assert [type(error) for error in raised] == [ZeroDivisionError]


def test_a_terminated_evaluation_gives_no_values_of_another():
    evaluator = evaluator_of(metrics=[Several(both)])
    evaluator.evaluate(labelled())
    call_at(evaluator, 2, evaluator.terminate)
    with pytest.raises(RuntimeError, match="the end of its loader, but stopped after 2 batches"):
        evaluator.evaluate(labelled())


def test_an_evaluation_that_ends_early_on_purpose_gives_the_values_so_far():
    evaluator = evaluator_of(metrics=[Several(both)])
    call_at(evaluator, 2, evaluator.terminate_epoch)
    assert evaluator.evaluate(labelled()) == {"samples": 10, "batches": 2}


def test_the_outputs_are_the_tasks_and_ignites_handlers_see_them():
    evaluator, seen = evaluator_of(), []
    Average(output_transform=lambda outputs: outputs["labels"].float().mean()).attach(
        evaluator, "mean_label"
    )
    evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: seen.append(list(e.state.output))
    )
    assert evaluator.evaluate(labelled()) == {}
    assert seen == [["logits", "labels"]] * 3
    assert 0 <= evaluator.state.metrics["mean_label"] <= 2


def test_bf16_evaluates_under_autocast():
    types = []

    def task(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        outputs = tasks.classification(model, batch)
        types.append(outputs["logits"].dtype)
        return outputs

    evaluator_of(task=task, precision="bf16").evaluate(labelled())
    assert set(types) == {torch.bfloat16}


def test_the_model_is_moved_to_the_evaluators_device():
    model = nn.Linear(4, 3)
    evaluator_of(model, device="meta")
    assert model.weight.device.type == "meta"
