"""The step: what each of its events sees, and what it never does."""

from __future__ import annotations

import math
import weakref
from contextlib import ExitStack, suppress
from itertools import pairwise
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.engine import MetricsEvents, StepEvents, StepOutput, tasks
from tests.engine.loop.loops import events_of
from tests.engine.models import (
    CoupledLoss,
    TokenLoss,
    Tokens,
    TwoTower,
    copied_gradients,
    gradients_of,
    paired,
    relative_error,
    sgd,
    trainer_of,
    twins,
)


def single(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() for key, value in batch.items()}


@pytest.mark.parametrize("size", [None, 3])
def test_each_event_sees_its_phase_and_none_of_the_next(size):
    trainer = trainer_of(microbatch_size=size)
    parameter = trainer.model.image[0].weight
    start, fired = parameter.detach().clone(), []

    @trainer.on(StepEvents.FORWARD_COMPLETED)
    def forward() -> None:
        fired.append("forward")
        assert {n: tuple(v.shape) for n, v in trainer.outputs.items()} == {
            "image_features": (8, 4),
            "text_features": (8, 4),
        }
        assert not any(v.requires_grad for v in trainer.outputs.values())
        assert parameter.grad is None

    @trainer.on(StepEvents.LOSS_COMPUTED)
    def loss() -> None:
        fired.append("loss")
        assert list(trainer.terms) == ["contrast", "spread"]
        assert not any(v.requires_grad for v in trainer.terms.values())
        assert parameter.grad is None

    @trainer.on(StepEvents.GRADIENTS_READY)
    def gradients() -> None:
        fired.append("gradients")
        assert parameter.equal(start)
        assert parameter.grad.abs().max() > 0

    @trainer.on(StepEvents.OPTIMIZER_STEPPED)
    def stepped() -> None:
        fired.append("stepped")
        torch.testing.assert_close(parameter, start - 0.1 * parameter.grad)

    trainer.run([paired(8)], max_epochs=1)
    assert fired == ["forward", "loss", "gradients", "stepped"]


def test_two_updates_equal_a_plain_loop():
    model, loss = TwoTower().double(), CoupledLoss().double()
    other, other_loss = twins(model, loss)
    batches = [paired(6), paired(4)]
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=0.01)
    trainer_of(model, loss, optimizer=optimizer).run(batches, max_epochs=3)
    optimizer = torch.optim.AdamW([*other.parameters(), *other_loss.parameters()], lr=0.01)
    for batch in batches * 3:
        optimizer.zero_grad()
        other_loss(*other(batch["image"], batch["text"])).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.equal(b)


def test_what_a_handler_makes_of_the_gradients_is_what_the_optimizer_applies():
    trainer = trainer_of()
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    @trainer.on(StepEvents.GRADIENTS_READY)
    def ones() -> None:
        for parameter in trainer.model.parameters():
            parameter.grad.fill_(1)

    trainer.run([paired(8)], max_epochs=1)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), start[name] - 0.1)


def test_gradients_of_parameters_that_no_optimizer_holds_do_not_pile_up():
    model, loss = TwoTower().double(), CoupledLoss().double()
    optimizer = torch.optim.SGD([*model.text.parameters(), *loss.parameters()], lr=0.0)
    batch = paired(6)
    trainer = trainer_of(model, loss, optimizer=optimizer)
    seen = []
    trainer.add_event_handler(
        StepEvents.GRADIENTS_READY, lambda: seen.append(copied_gradients(model)["0.image.0.weight"])
    )
    trainer.run([batch], max_epochs=3)
    assert seen[0].equal(seen[1])
    assert seen[0].equal(seen[2])


@pytest.mark.parametrize("size", [None, 3])
def test_fp16_gradients_are_unscaled_when_they_are_ready(size):
    model, loss, batch = TwoTower(), CoupledLoss(), single(paired(8))
    other, other_loss = twins(model, loss)
    exact = gradients_of(trainer_of(other, other_loss), batch)
    found = gradients_of(trainer_of(model, loss, precision="fp16", microbatch_size=size), batch)
    assert 0 < relative_error(found, exact) < 0.02


class Overflow(nn.Module):
    """A loss that is infinite for the updates named."""

    couples_samples = True

    def __init__(self, *updates: int) -> None:
        super().__init__()
        self.updates, self.calls = updates, 0

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        factor = math.inf if self.calls in self.updates else 1.0
        return (image * text).float().mean() * factor


def test_fp16_skips_an_update_that_overflows_and_counts_it():
    model, loss = TwoTower(), Overflow(2, 4)
    trainer = trainer_of(model, loss, precision="fp16", optimizer=sgd(model), log_every=1)
    weights, counts = [], []

    @trainer.on(Events.ITERATION_COMPLETED)
    def note() -> None:
        weights.append(model.image[0].weight.detach().clone())

    trainer.add_event_handler(
        "LOGGED", lambda: counts.append(trainer.metrics.record.values["train/skipped_steps"])
    )
    trainer.run([single(paired(4)) for _ in range(5)], max_epochs=1)
    moved = [not a.equal(b) for a, b in pairwise(weights)]
    assert moved == [False, True, False, True]
    assert counts == [0, 1, 1, 2, 2]


def test_fp16_takes_an_update_that_reaches_nothing_of_the_optimizer():
    model, loss = TwoTower(), CoupledLoss()
    trainer = trainer_of(model, loss, precision="fp16", optimizer=sgd(model, loss))
    batch = single(paired(4))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    loss.requires_grad_(False)

    def pairs(model: nn.Module, batch: Any) -> Any:
        outputs = tasks.image_text(model, batch)
        return {name: value.requires_grad_() for name, value in outputs.items()}

    trainer.task = pairs
    before = model.image[0].weight.clone()
    trainer.run([batch], max_epochs=1)
    assert model.image[0].weight.equal(before)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    trainer.task = tasks.image_text
    trainer.run([batch], max_epochs=2)
    assert not model.image[0].weight.equal(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_scaler_without_fp16(precision):
    assert trainer_of(precision=precision).scaler is None


class NoReading(TorchDispatchMode):
    """Refuses every operation that takes a value from a tensor to Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read")
        return func(*args, **(kwargs or {}))


def test_the_guard_against_reading_notices_it():
    with NoReading(), pytest.raises(AssertionError, match="was read"):
        torch.ones(()).item()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("kind", ["coupled", "sample mean"])
def test_nothing_is_read_from_a_tensor_between_two_log_points(precision, size, kind):
    if kind == "coupled":
        settings = {"model": TwoTower(), "loss": CoupledLoss()}
        batch = single(paired(8))
    else:
        settings = {"model": Tokens(), "loss": TokenLoss(), "task": tasks.next_token}
        batch = {"tokens": torch.randint(1, 7, (8, 5))}
    trainer = trainer_of(**settings, precision=precision, microbatch_size=size, log_every=4)
    guard, records = ExitStack(), events_of(trainer, MetricsEvents.LOGGED)
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=5), lambda: guard.enter_context(NoReading())
    )
    trainer.add_event_handler(Events.ITERATION_STARTED(once=8), guard.close)
    trainer.run([batch] * 8, max_epochs=1)
    assert records == ["LOGGED"] * 2


def test_the_output_is_frozen_detached_and_never_a_number():
    trainer = trainer_of(microbatch_size=3)
    trainer.run([paired(8)], max_epochs=1)
    output = trainer.state.output
    assert isinstance(output, StepOutput)
    assert output.batch_size == 8
    torch.testing.assert_close(output.loss, sum(output.terms.values()))
    assert all(
        isinstance(v, Tensor) and v.ndim == 0 and v.grad_fn is None and not v.requires_grad
        for v in (output.loss, *output.terms.values())
    )
    with pytest.raises(AttributeError):
        output.loss = torch.zeros(())


class Bounded(nn.Module):
    """A loss inside a loss, whose scale must stay at 1 or below."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.seen: list[float] = []

    @torch.no_grad()
    def constrain(self) -> None:
        self.seen.append(self.scale.item())
        self.scale.clamp_(max=1.0)


class Wrapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Bounded()

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return (image * text).pow(2).mean() - self.inner.scale


def test_constrain_is_called_wherever_it_is_after_the_step_and_before_its_event():
    loss, model = Wrapping(), TwoTower()
    trainer = trainer_of(model, loss, optimizer=sgd(model, loss, lr=1.0))
    at_event = []
    trainer.add_event_handler(
        StepEvents.OPTIMIZER_STEPPED, lambda: at_event.append(loss.inner.scale.item())
    )
    trainer.run([single(paired(4))] * 2, max_epochs=1)
    assert loss.inner.seen == pytest.approx([1.9, 2.0])
    assert at_event == [1.0, 1.0]


def test_a_failed_step_leaves_no_graph_behind():
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()
            alive.add(self)

    trainer = trainer_of()

    @trainer.on(StepEvents.LOSS_COMPUTED)
    def fail() -> None:
        assert len(alive) > 0
        raise ValueError("stop here")

    hooks = torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor)
    with suppress(ValueError), hooks:
        trainer.run([paired(8)], max_epochs=1)
    assert len(alive) == 0


@pytest.mark.parametrize("batch", [[], {"names": "a"}, None])
def test_a_batch_without_samples_is_a_clear_error(batch):
    with pytest.raises(ValueError, match="a batch must hold a tensor"):
        trainer_of().run([batch], max_epochs=1)


class WeightTerms(nn.Module):
    """A loss whose terms are a parameter, a view of one, a buffer and a computed value."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.pair = nn.Parameter(torch.tensor([0.25, 0.75]))
        self.register_buffer("calls", torch.tensor(0.0))

    def terms(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        own = (image * text).mean()
        return {"scale": self.scale, "pair": self.pair[0], "calls": self.calls, "own": own}


def test_a_term_that_is_a_weight_is_published_as_it_was_in_the_loss():
    loss = WeightTerms()
    trainer = trainer_of(loss=loss.double(), log_every=1)
    scales: list[tuple[float, ...]] = []
    records: list[dict[str, float]] = []
    trainer.add_event_handler(
        StepEvents.FORWARD_COMPLETED,
        lambda: scales.append((loss.scale.item(), loss.pair[0].item(), loss.calls.item() + 1)),
    )
    trainer.add_event_handler(
        MetricsEvents.LOGGED, lambda: records.append(dict(trainer.metrics.record.values))
    )
    trainer.run([paired(4) for _ in range(3)], max_epochs=1)
    tags = ("train/scale", "train/pair", "train/calls")
    assert [tuple(record[tag] for tag in tags) for record in records] == scales


@pytest.mark.parametrize("is_held", [False, True])
def test_gradients_of_new_parameters_do_not_add_up(is_held):
    trainer, batch = trainer_of(), paired(8)
    trainer.make_update(batch)
    late = nn.Parameter(torch.ones(()))
    trainer.model.register_parameter("late", late)
    if is_held:
        trainer.optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(())
    trainer.make_update(batch)
    assert late.grad is None
