"""WeightAverage against plain arithmetic in float64."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from ignite.metrics import Loss
from torch import Tensor, nn

from diptych.engine import (
    CheckpointError,
    Evaluator,
    SeededLoader,
    StepEvents,
    Trainer,
    certify,
    tasks,
)
from diptych.handlers import CheckpointManager, Evaluation, LossGuard
from diptych.handlers.optimization.weight_average import WeightAverage
from tests.handlers.runs import Squares, Stop, stop_at


class Normed(nn.Module):
    """Two layers with a batch norm between, and a weight that two places share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        self.twin = self.last

    def forward(self, image: Tensor) -> Tensor:
        return self.last(self.norm(self.first(image)))


def make_loader(batches: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batches, 4, 3, generator=generator)
    return [{"image": image, "label": torch.arange(4) % 2} for image in images]


def make_trainer(*, fused: bool = False, **settings: Any) -> Trainer:
    torch.manual_seed(1)
    model = Normed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    return Trainer(
        model,
        settings.pop("loss", nn.CrossEntropyLoss()),
        optimizer,
        task=tasks.classification,
        device="cpu",
        seed=3,
        **settings,
    )


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


def history_of(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Return a list that fills with the model's state, at the start and after each update."""
    states: list[dict[str, Tensor]] = []
    for event in (Events.STARTED, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(event, lambda: states.append(copied(trainer.model.state_dict())))
    return states


def averaged_by_hand(values: list[Tensor], decay: float, *, warmup: bool) -> Tensor:
    """The recursion of the docstring, in float64."""
    average = values[0].double()
    for n, value in enumerate(values[1:]):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = d * average + (1 - d) * value.double()
    return average


def mean_loss() -> Loss:
    """Return Ignite's own mean of the cross entropy."""
    return Loss(nn.functional.cross_entropy, output_transform=lambda output: tuple(output.values()))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.2, 0.9])
def test_the_average_follows_the_recursion(decay, warmup):
    trainer, average = make_trainer(), WeightAverage(decay=decay, warmup=warmup)
    states = history_of(trainer.attach(average))
    trainer.run(make_loader(), max_epochs=2)
    found = average.average_state_dict()
    assert average.updates == 12
    for key in found.keys() - {"norm.num_batches_tracked"}:
        expected = averaged_by_hand([state[key] for state in states], decay, warmup=warmup)
        torch.testing.assert_close(found[key].double(), expected, rtol=1e-5, atol=1e-6)
    assert found["norm.num_batches_tracked"] == 12


def test_buffers_may_be_copied_from_the_model():
    trainer, average = make_trainer(), WeightAverage(buffers="copy")
    trainer.attach(average).run(make_loader(), max_epochs=1)
    found, trained = average.average_state_dict(), copied(trainer.model.state_dict())
    assert torch.equal(found["norm.running_mean"], trained["norm.running_mean"])
    assert not torch.equal(found["norm.weight"], trained["norm.weight"])
    for value in found.values():
        value.fill_(7)
    assert_same(trainer.model.state_dict(), trained)


def test_averaging_does_not_change_the_run():
    bare, trainer = make_trainer(), make_trainer()
    trainer.attach(WeightAverage())
    for one in (bare, trainer):
        one.run(make_loader(), max_epochs=2)
    assert_same(trainer.model.state_dict(), bare.model.state_dict())


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_the_model_holds_the_averages_inside_and_the_trained_weights_after(buffers):
    trainer, average = make_trainer(), WeightAverage(decay=0.9, buffers=buffers)
    trainer.attach(average).run(make_loader(), max_epochs=1)
    before, expected = copied(trainer.model.state_dict()), average.average_state_dict()
    with average.averaged():
        assert_same(trainer.model.state_dict(), expected)
        assert torch.equal(trainer.model.twin.weight, expected["twin.weight"])
        with average.averaged():
            assert_same(trainer.model.state_dict(), expected)
        assert_same(trainer.model.state_dict(), expected)
        trainer.model.norm.running_mean.fill_(9)
    assert_same(trainer.model.state_dict(), before)


def test_the_trained_weights_are_restored_after_an_error():
    trainer, average = make_trainer(), WeightAverage()
    trainer.attach(average).run(make_loader(), max_epochs=1)
    before = copied(trainer.model.state_dict())
    with pytest.raises(ZeroDivisionError), average.averaged():
        raise ZeroDivisionError
    assert_same(trainer.model.state_dict(), before)


def test_before_a_run_the_averages_are_the_weights():
    trainer, average = make_trainer(), WeightAverage()
    trainer.attach(average)
    before = copied(trainer.model.state_dict())
    with average.averaged():
        assert_same(trainer.model.state_dict(), before)


def test_using_the_averages_in_the_middle_of_a_run_changes_nothing():
    def run(*, looking: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trainer, average = make_trainer(), WeightAverage()
        trainer.attach(average)

        def look() -> None:
            with average.averaged():
                trainer.model.eval()(torch.ones(2, 3))
            trainer.model.train()

        if looking:
            trainer.add_event_handler(Events.ITERATION_COMPLETED, look)
        trainer.run(make_loader(), max_epochs=2)
        return trainer.model.state_dict(), average.average_state_dict()

    for found, expected in zip(run(looking=True), run(looking=False), strict=True):
        assert_same(found, expected)


def test_a_weight_in_half_precision_is_averaged_in_float32():
    trainer, average = make_trainer(), WeightAverage(decay=0.999, warmup=False)
    trainer.model.to(torch.bfloat16)
    trainer.attach(average)
    average.state_dict()  # begins
    with torch.no_grad():
        trainer.model.first.weight.add_(1.0)
    before = average.average_state_dict()["first.weight"]
    trainer.model.first.weight.grad = torch.zeros_like(trainer.model.first.weight)
    trainer.fire_event(StepEvents.OPTIMIZER_STEPPED)
    after = average.average_state_dict()["first.weight"]
    assert after.dtype == torch.float32
    moved = 0.001 * (trainer.model.first.weight.float() - before)
    torch.testing.assert_close(after - before, moved, rtol=1e-3, atol=1e-7)
    with average.averaged():
        assert trainer.model.first.weight.dtype == torch.bfloat16


class Overflow(nn.Module):
    """Cross entropy that is infinite for the updates named."""

    def __init__(self, *updates: int) -> None:
        super().__init__()
        self.updates, self.calls = updates, 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        factor = math.inf if self.calls in self.updates else 1.0
        return nn.functional.cross_entropy(logits.float(), labels) * factor


GUARDS = {
    "fp16": ({"precision": "fp16"}, None),
    "guard": ({}, "after"),
    "guard on the device, before": ({"fused": True}, "before"),
    "guard on the device, after": ({"fused": True}, "after"),
}


@pytest.mark.parametrize("way", GUARDS)
def test_a_skipped_update_does_not_change_the_average(way):
    settings, place = GUARDS[way]
    trainer = make_trainer(loss=Overflow(2, 5), **settings)
    average, guard = WeightAverage(decay=0.9), LossGuard(window=99)
    handlers = {"before": (guard, average), "after": (average, guard), None: (average,)}
    trainer.attach(*handlers[place])
    states = history_of(trainer)
    trainer.run(make_loader(8), max_epochs=1)
    for key in ("first.weight", "norm.bias", "last.weight"):
        values = [state[key] for state in states]
        made = [b for a, b in itertools.pairwise(values) if not torch.equal(a, b)]
        assert len(made) == 6
        expected = averaged_by_hand([values[0], *made], 0.9, warmup=True)
        found = average.average_state_dict()[key]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_interruption_does_not_change_the_average():
    def build() -> tuple[Trainer, SeededLoader]:
        return make_trainer().attach(WeightAverage(decay=0.9)), SeededLoader(Squares(), 4, seed=3)

    report = certify.interruption(build, steps=12, at=5)
    assert report.passed, str(report)
    assert not report.forgotten


def test_a_killed_and_resumed_run_ends_with_the_average_of_an_uninterrupted_one(tmp_path):
    def run(folder: str, *, killed: bool = False) -> dict[str, Tensor]:
        trainer, average = make_trainer(), WeightAverage(decay=0.9)
        trainer.attach(average, CheckpointManager(tmp_path / folder, every=2))
        if killed:
            stop_at(trainer, 5)
        trainer.run(SeededLoader(Squares(), 4, seed=3), max_epochs=3)
        return average.average_state_dict()

    expected = run("whole")
    with pytest.raises(Stop):
        run("killed", killed=True)
    assert_same(run("killed"), expected)


def test_an_average_of_other_weights_is_refused():
    trainer, average = make_trainer(), WeightAverage(buffers="copy")
    trainer.attach(average)
    state = copy.deepcopy(average.state_dict())
    other = WeightAverage()
    make_trainer().attach(other)
    with pytest.raises(CheckpointError, match=r"buffers='average', got a difference in norm\.run"):
        other.load_state_dict(state)
    state["average"]["first.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"got a difference in first\.weight"):
        average.load_state_dict(state)


def test_a_run_is_not_saved_with_the_averages_in_the_model():
    trainer, average = make_trainer(), WeightAverage()
    trainer.attach(average)
    with average.averaged(), pytest.raises(CheckpointError, match="Save it after averaged"):
        average.state_dict()


def test_a_run_that_starts_over_starts_a_new_average():
    trainer, average = make_trainer(), WeightAverage()
    trainer.attach(average).run(make_loader(), max_epochs=1)
    trainer.state.max_epochs = None
    trainer.run(make_loader(), max_epochs=1)
    assert average.updates == 6


def test_the_exported_file_holds_the_averages_under_plain_names(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the extra is not installed")
    trainer, average = make_trainer(), WeightAverage()
    trainer.attach(average).run(make_loader(), max_epochs=1)
    average.export(tmp_path / "model.safetensors")
    found = safetensors.load_file(tmp_path / "model.safetensors")
    assert_same(found, average.average_state_dict())
    assert found.keys() == Normed().state_dict().keys()


def average_on_a_rank(half: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train on this rank's half of each batch; return the average and what the model holds."""
    trainer, average = make_trainer(), WeightAverage(decay=0.9)
    trainer.attach(average)
    batches = [
        {key: value[2 * half : 2 * half + 2] for key, value in batch.items()}
        for batch in make_loader()
    ]
    trainer.run(batches, max_epochs=1)
    with average.averaged():
        inside = copied(trainer.model.state_dict())
    assert dist.get_world_size() == 2
    return average.average_state_dict(), inside


def test_all_ranks_evaluate_the_same_average(ranks):
    (first, inside), (_, also_inside) = ranks.run(average_on_a_rank, [(0,), (1,)])
    assert_same(inside, first)
    assert_same(also_inside, first)


def test_a_second_average_is_refused():
    with pytest.raises(ValueError, match="must have one WeightAverage"):
        make_trainer().attach(WeightAverage(), WeightAverage())


def test_an_average_that_is_not_attached_raises():
    with pytest.raises(RuntimeError, match="must be attached to a trainer, got none"):
        WeightAverage().average_state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"decay": math.nan}, r"decay must lie in \[0, 1\), got nan"),
        ({"buffers": "alias"}, "buffers"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightAverage(**arguments)


def test_an_evaluation_takes_the_averages_and_leaves_the_trained_weights():
    trainer, average = make_trainer(), WeightAverage(decay=0.9)
    trainer.attach(average, Evaluation(make_loader(2)))
    trainer.run(make_loader(), max_epochs=1)
    trained = copied(trainer.model.state_dict())
    evaluator = Evaluator(
        trainer.model, task=tasks.classification, metrics={"loss": mean_loss()}, device="cpu"
    )
    with average.averaged():
        expected = evaluator.evaluate(make_loader(2))["loss"]
    assert trainer.state.metrics["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert evaluator.evaluate(make_loader(2))["loss"] != pytest.approx(expected, rel=1e-3)
    assert_same(trainer.model.state_dict(), trained)
