"""GradientClipping: the gradients after it, and the norm that it publishes."""

from __future__ import annotations

import math

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine import MetricsEvents, StepEvents, Trainer, tasks
from diptych.handlers.optimization.gradient_clipping import GradientClipping


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.scale * logits, labels)


def make_loader() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = 5 * torch.randn(3, 4, 3, generator=generator)
    return [{"image": image, "label": torch.arange(4) % 2} for image in images]


def make_trainer(device: str = "cpu") -> Trainer:
    torch.manual_seed(1)
    model, loss = nn.Linear(3, 2), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.01)
    return Trainer(model, loss, optimizer, task=tasks.classification, device=device, log_every=1)


def run_noting_gradients(*handlers: GradientClipping) -> tuple[list[Tensor], list[float]]:
    """Return each update's gradient, all parameters in one vector, and the published norms."""
    trainer = make_trainer()
    trainer.attach(*handlers)
    gradients = []
    parameters = [*trainer.model.parameters(), *trainer.loss.parameters()]
    trainer.add_event_handler(
        StepEvents.GRADIENTS_READY,
        lambda: gradients.append(torch.cat([p.grad.flatten() for p in parameters]).clone()),
    )
    norms = []
    trainer.add_event_handler(
        MetricsEvents.LOGGED,
        lambda: norms.append(trainer.metrics.record.values.get("gradients/norm")),
    )
    trainer.run(make_loader(), max_epochs=1)
    return gradients, norms


def first_gradient() -> Tensor:
    gradients, _ = run_noting_gradients()
    return gradients[0]


def test_the_norm_is_scaled_to_its_bound_and_published_as_it_was_before():
    raw = first_gradient()
    gradients, norms = run_noting_gradients(GradientClipping(max_norm=0.5))
    norm = math.sqrt(sum(float(x) ** 2 for x in raw))
    assert norms[0] == pytest.approx(norm, rel=1e-6)
    assert float(gradients[0].norm()) == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(gradients[0], raw * 0.5 / norm, rtol=1e-4, atol=0)


def test_entries_are_clamped_to_their_bound():
    raw = first_gradient()
    bound = float(raw.abs().median())
    gradients, norms = run_noting_gradients(GradientClipping(max_value=bound))
    assert torch.equal(gradients[0], raw.clamp(-bound, bound))
    assert norms[0] == pytest.approx(float(raw.norm()), rel=1e-6)


def test_with_both_bounds_the_norm_is_clipped_first():
    raw = first_gradient()
    gradients, _ = run_noting_gradients(GradientClipping(max_norm=1.0, max_value=0.3))
    expected = (raw / raw.norm()).clamp(-0.3, 0.3)
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=0)


def test_gradients_within_the_bounds_do_not_change():
    gradients, _ = run_noting_gradients(GradientClipping(max_norm=1e6, max_value=1e6))
    bare, _ = run_noting_gradients()
    assert all(torch.equal(a, b) for a, b in zip(gradients, bare, strict=True))


@pytest.mark.gpu
def test_clipping_does_not_synchronise_with_the_device():
    trainer = make_trainer("cuda").attach(GradientClipping(max_norm=0.5, max_value=0.1))
    mode = torch.cuda.get_sync_debug_mode()
    trainer.add_event_handler(
        StepEvents.FORWARD_COMPLETED, lambda: torch.cuda.set_sync_debug_mode("error")
    )
    trainer.add_event_handler(
        StepEvents.OPTIMIZER_STEPPED, lambda: torch.cuda.set_sync_debug_mode(mode)
    )
    trainer.run(make_loader(), max_epochs=1)
    assert trainer.state.iteration == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs max_norm, max_value or both, got neither"),
        ({"max_norm": 0}, "max_norm must be > 0 and finite, got 0"),
        ({"max_value": -1.0}, "max_value must be > 0 and finite, got -1.0"),
        ({"max_norm": math.inf}, "got inf"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientClipping(**arguments)


def test_the_gradients_of_a_group_added_during_the_run_are_clipped_too():
    trainer = make_trainer()
    (scale,) = trainer.loss.parameters()
    trainer.optimizer.param_groups[0]["params"].pop()
    trainer.add_event_handler(
        Events.EPOCH_STARTED(once=2),
        lambda t: t.optimizer.add_param_group({"params": [scale], "lr": 0.0}),
    )
    trainer.attach(GradientClipping(max_norm=0.5))
    norms: list[float] = []
    trainer.add_event_handler(
        StepEvents.OPTIMIZER_STEPPED,
        lambda: norms.append(
            float(torch.stack([p.grad.norm() for p in [*trainer.model.parameters(), scale]]).norm())
        ),
    )
    trainer.run(make_loader()[:1], max_epochs=2)
    assert norms[0] > 0.5 + 1e-3
    assert norms[1] == pytest.approx(0.5, rel=1e-4)
