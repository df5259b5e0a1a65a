"""An exception on a GPU: the next run gives what a run without it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diptych.engine import StepEvents, Trainer, tasks

pytestmark = pytest.mark.gpu


def train(event: Any, fails_at: int, precision: Any) -> dict[str, Any]:
    """Train, with an exception in the nth call of a handler; return all that is to be equal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        task=tasks.classification,
        precision=precision,
        seed=1,
    )
    calls: list[int] = []

    def fail() -> None:
        calls.append(len(calls) + 1)
        if calls[-1] == fails_at:
            raise KeyboardInterrupt

    trainer.add_event_handler(event, fail)
    generator = torch.Generator().manual_seed(0)
    data = [
        {"image": torch.randn(8, 6, generator=generator), "label": torch.arange(8) % 4}
        for _ in range(4)
    ]
    if fails_at:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(data, max_epochs=2)
    trainer.run(data, max_epochs=2)
    return {
        "model": trainer.model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "history": trainer.metrics.get_history("train/loss"),
        "generator": torch.cuda.get_rng_state(),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("event", list(StepEvents), ids=lambda event: event.name)
def test_an_exception_in_a_step_on_the_device_changes_nothing(event, precision):
    expected = train(event, 0, precision)
    for time in (1, 3):
        found = train(event, time, precision)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
