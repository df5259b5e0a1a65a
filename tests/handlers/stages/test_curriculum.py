"""Curriculum: values over time, metrics that start a change, resumption, refused arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine import CheckpointError, SeededLoader, Trainer, certify, tasks
from diptych.engine.handler import contract_of
from diptych.handlers import Curriculum, Evaluation
from diptych.losses import CLIPLoss, HybridLoss, SigLIPLoss, TripletLoss, VICRegLoss, WeightedSum
from tests.handlers.runs import report_each_epoch


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {name: torch.randn(4, generator=generator) for name in ("image", "text")}


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


def loader() -> SeededLoader:
    """Return five batches an epoch."""
    return SeededLoader(Pairs(), 4)


def make_trainer(loss: nn.Module, *, log_every: int = 1) -> Trainer:
    torch.manual_seed(0)
    model = TwoTowers()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.01)
    return Trainer(
        model, loss, optimizer, task=tasks.image_text, device="cpu", seed=0, log_every=log_every
    )


def values_of(trainer: Trainer, read: Any) -> list[Any]:
    """Return a list of the values at each update, filled during the run."""
    values: list[Any] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: values.append(read()))
    return values


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0, 0, 0, 2, 4, 6, 8, 8, 8, 8]),
        ("cosine", [0, 0, 0, *(4 - 4 * math.cos(math.pi * i / 4) for i in (1, 2, 3)), 8, 8, 8, 8]),
        ("step", [0, 0, 0, 0, 0, 0, 8, 8, 8, 8]),
    ],
)
def test_a_weight_changes_by_the_shape(shape, expected):
    loss = VICRegLoss()
    trainer = make_trainer(loss)
    trainer.attach(
        Curriculum("loss.invariance_weight", start=0, end=8, over=4, after=2, shape=shape)
    )
    values = values_of(trainer, lambda: loss.invariance_weight)
    trainer.run(loader(), max_epochs=2)
    assert values == pytest.approx(expected)


def test_a_function_of_the_iterations_gives_the_value():
    loss = VICRegLoss()
    trainer = make_trainer(loss)
    trainer.attach(Curriculum("loss.variance_weight", function=lambda done: done**2, after=1))
    values = values_of(trainer, lambda: loss.variance_weight)
    trainer.run(loader(), max_epochs=1)
    assert values == [25.0, 0, 1, 4, 9]


def test_the_change_starts_from_the_current_value():
    loss = CLIPLoss(temperature=0.2, learn_temperature=False)
    trainer = make_trainer(loss).attach(Curriculum("loss.temperature.value", end=0.1, over=2))
    values = values_of(trainer, lambda: loss.temperature.value)
    trainer.run(loader(), max_epochs=1)
    assert values == pytest.approx([0.2, 0.15, 0.1, 0.1, 0.1])


def test_a_step_switches_a_value_that_is_not_a_number():
    loss = TripletLoss(negatives="sum")
    trainer = make_trainer(loss)
    trainer.attach(Curriculum("loss.negatives", end="hardest", after=3, shape="step"))
    values = values_of(trainer, lambda: loss.negatives)
    published = values_of(
        trainer, lambda: trainer.metrics.record.values.get("curriculum/loss.negatives")
    )
    trainer.run(loader(), max_epochs=1)
    assert values == ["sum", "sum", "sum", "hardest", "hardest"]
    assert [value for value in published if value is not None][-1] == 1.0


def test_entries_of_mappings_and_sequences_are_attributes_too():
    loss = WeightedSum(losses={"clip": CLIPLoss(), "siglip": SigLIPLoss()})
    loss.steps = [1.0, 2.0]
    trainer = make_trainer(loss)
    trainer.model.drops = nn.Sequential(nn.Dropout(0.1))
    trainer.attach(
        Curriculum("loss.weights.siglip", end=0.5),
        Curriculum("loss.steps.1", end=7.0),
        Curriculum("model.drops.0.p", end=0.25),
    )
    trainer.run(loader(), max_epochs=1)
    assert loss.weights == {"clip": 1.0, "siglip": 0.5}
    assert loss.steps == [1.0, 7.0]
    assert trainer.model.drops[0].p == 0.25


def test_a_change_starts_when_the_metric_passes_and_continues_if_it_falls_back():
    loss = HybridLoss()
    trainer = make_trainer(loss)
    trainer.attach(
        Curriculum("loss.alpha", end=1.0, over=2, metric="val/alignment", above=0.5, name="alpha")
    )
    report_each_epoch(trainer, 0.2, 0.5, 0.6, 0.1, tag="val/alignment")
    alphas = values_of(trainer, lambda: loss.alpha)
    trainer.run(loader(), max_epochs=4)
    assert alphas == [0] * 16 + [0.5, 1, 1, 1]
    assert trainer.handlers[0].began == 15


def test_a_metric_may_fall_below_its_threshold_at_a_log_point():
    loss = VICRegLoss()
    trainer = make_trainer(loss)
    trainer.attach(
        Curriculum("loss.epsilon", end=1e-3, metric="train/loss", below=math.inf, after=1)
    )
    values = values_of(trainer, lambda: loss.epsilon)
    trainer.run(loader(), max_epochs=1)
    assert values == [1e-4, 1e-4, 1e-3, 1e-3, 1e-3]


def test_the_value_is_published():
    trainer = make_trainer(VICRegLoss())
    trainer.attach(Curriculum("loss.invariance_weight", start=0, end=10, over=10))
    trainer.run(loader(), max_epochs=1)
    assert trainer.metrics.record.values["curriculum/loss.invariance_weight"] == pytest.approx(4)


def curricular() -> tuple[Trainer, SeededLoader]:
    loss = HybridLoss(contrastive=TripletLoss(negatives="sum"))
    trainer = make_trainer(loss, log_every=3)
    trainer.attach(
        Curriculum("loss.alpha", end=1.0, over=6, metric="train/loss", below=1e9),
        Curriculum("loss.losses.vicreg.invariance_weight", start=0.0, end=25.0, over=9),
        Curriculum("loss.losses.contrastive.negatives", end="hardest", shape="step", after=4),
    )
    return trainer, loader()


@pytest.mark.parametrize("at", [1, 4, 7, 11])
def test_an_interruption_changes_nothing(at):
    report = certify.interruption(curricular, steps=13, at=at)
    assert report.passed, report


def test_a_resumed_run_has_the_values_before_its_first_iteration():
    first, batches = curricular()
    first.run(batches, max_iters=8)
    second, _ = curricular()
    for old, new in zip(first.handlers, second.handlers, strict=True):
        new.load_state_dict(old.state_dict())
    assert 0 < first.loss.alpha < 1
    assert second.loss.alpha == first.loss.alpha
    assert second.loss.losses["contrastive"].negatives == "hardest"


def test_a_run_that_starts_over_starts_the_change_again():
    loss = VICRegLoss()
    trainer = make_trainer(loss)
    trainer.attach(Curriculum("loss.epsilon", end=1e-3, metric="train/loss", below=1e9, after=2))
    values = values_of(trainer, lambda: loss.epsilon)
    trainer.run(loader(), max_epochs=1)
    trainer.state.max_epochs = None
    trainer.run(loader(), max_epochs=1)
    assert values[5:] == values[:5]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (
            "loss.invariance_wieght",
            ValueError,
            "no 'invariance_wieght'. Similar names: invarian",
        ),
        (
            "loss.head.alpha",
            ValueError,
            "VICRegLoss has no 'head'. Known names: .*invariance_weight",
        ),
        ("optimizer.lr", ValueError, "must begin with loss, model, task .* got 'optimizer.lr'"),
        ("loss", ValueError, "name an attribute of it, got 'loss'"),
        ("model.image.weight", TypeError, "plain value that can be set, got a Parameter"),
        ("model.image", TypeError, "got a Linear"),
    ],
)
def test_a_wrong_path_is_refused_when_attached(path, error, message):
    with pytest.raises(error, match=message):
        make_trainer(VICRegLoss()).attach(Curriculum(path, end=1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs either end or function, got end=None"),
        ({"end": 1, "function": abs}, "either end or function, got end=1"),
        ({"end": 1, "over": -1}, "over must be a whole number of iterations >= 0, got -1"),
        ({"end": 1, "shape": "sine"}, "shape must be one of linear, cosine, step, got 'sine'"),
        ({"end": 1, "above": 0.5}, "above and below need a metric, got none"),
        ({"end": 1, "metric": "val/x"}, "needs either above or below, got None and None"),
        ({"start": "sum", "end": "hardest"}, "linear curriculum must be finite numbers, got 'sum'"),
    ],
)
def test_contradictory_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Curriculum("loss.alpha", **arguments)


def test_a_second_curriculum_of_an_attribute_is_refused():
    trainer = make_trainer(HybridLoss()).attach(Curriculum("loss.alpha", end=1.0))
    with pytest.raises(ValueError, match=r"one Curriculum, got a second: loss.alpha"):
        trainer.attach(Curriculum("loss.alpha", end=0.5))


def test_a_state_of_another_attribute_is_refused():
    handlers = [Curriculum(f"loss.{part}_weight", end=0.0) for part in ("variance", "covariance")]
    make_trainer(VICRegLoss()).attach(*handlers)
    with pytest.raises(CheckpointError, match=r"checkpoint's, loss\.covariance_weight, got"):
        handlers[0].load_state_dict(handlers[1].state_dict())


def test_a_metric_that_is_not_published_in_the_first_epoch_is_an_error():
    trainer = make_trainer(HybridLoss())
    trainer.attach(Curriculum("loss.alpha", end=1.0, metric="val/recal", above=0.5))
    with pytest.raises(KeyError, match=r"got 'val/recal'; there are .*train/loss"):
        trainer.run(loader(), max_epochs=2)


def test_a_metric_that_its_evaluation_does_not_publish_is_an_error():
    trainer = make_trainer(HybridLoss())
    curriculum = Curriculum("loss.alpha", end=1.0, metric="val/recal", above=0.5)
    trainer.attach(Evaluation(list(loader())), curriculum)
    with pytest.raises(KeyError, match=r"got 'val/recal'; there are .*val/loss"):
        trainer.run(loader(), max_epochs=2)


def test_a_value_that_the_attribute_refuses_is_refused_when_attached():
    trainer = make_trainer(HybridLoss(alpha=0.25))
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2"):
        trainer.attach(Curriculum("loss.alpha", end=2.0))
    assert trainer.loss.alpha == 0.25


def test_curricula_are_named_by_their_paths():
    assert contract_of(Curriculum("loss.alpha", end=1.0)).key == "Curriculum[loss.alpha]"
