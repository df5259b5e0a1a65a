"""Handlers with memory of events inside the step: a step that is repeated counts once."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import Handler, MetricsEvents, StepEvents, Trainer, tasks
from diptych.engine.state.handler_states import stateful_handlers
from diptych.handlers import (
    GradientClipping,
    GradientDiagnostics,
    InBatchAccuracy,
    LossGuard,
    ModalityBalancing,
    OnlineLinearProbe,
    RepresentationHealth,
    WeightAverage,
)
from diptych.losses import CLIPLoss

HANDLERS: dict[str, Any] = {
    "clipping": lambda: GradientClipping(max_norm=0.1),
    "diagnostics": lambda: GradientDiagnostics(every=2),
    "guard": lambda: LossGuard(policy="skip", window=50),
    "balancing": lambda: ModalityBalancing(warmup=1),
    "probe": lambda: OnlineLinearProbe(classes=3),
    "accuracy": lambda: InBatchAccuracy(every=2),
    "health": lambda: RepresentationHealth(every=2),
    "average": lambda: WeightAverage(decay=0.9),
}
EVENTS = [*StepEvents, MetricsEvents.LOGGED]


class TwoTowers(nn.Module):
    """Two towers, one with a dropout and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        self.text = nn.Linear(5, 4)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


def train(handler: Handler, event: Any, fails_at: int) -> dict[str, Any]:
    """Train, with an exception in the nth call of a function at an event; return all results."""
    torch.manual_seed(0)
    model, loss = TwoTowers(), CLIPLoss()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=0.01)
    trainer = Trainer(
        model, loss, optimizer, task=tasks.image_text, device="cpu", seed=1, log_every=2
    )
    trainer.attach(handler)
    calls: list[int] = []

    def fail() -> None:
        calls.append(len(calls) + 1)
        if calls[-1] == fails_at:
            raise RuntimeError("planned")

    trainer.add_event_handler(event, fail)
    records: list[Any] = []
    trainer.add_event_handler(
        MetricsEvents.LOGGED, lambda: records.append(trainer.metrics.record.values)
    )
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "image": torch.randn(8, 6, generator=generator),
            "text": torch.randn(8, 5, generator=generator),
            "label": torch.arange(8) % 3,
        }
        for _ in range(4)
    ]
    if fails_at:
        with pytest.raises(RuntimeError, match="planned"):
            trainer.run(data, max_epochs=2)
    trainer.run(data, max_epochs=2)
    return {
        "weights": [p.detach().clone() for p in trainer.model.parameters()],
        "records": records,
        "handlers": {k: h.state_dict() for k, h in stateful_handlers(trainer).items()},
    }


@cache
def whole(name: str) -> dict[str, Any]:
    """Return the results of a run without an exception."""
    return train(HANDLERS[name](), StepEvents.FORWARD_COMPLETED, 0)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.name)
@pytest.mark.parametrize("name", HANDLERS)
def test_a_repeated_step_counts_once(name, event):
    found = train(HANDLERS[name](), event, 2)

    torch.testing.assert_close(found, whole(name), rtol=0, atol=0, equal_nan=True)
