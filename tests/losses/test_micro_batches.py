"""Every registered loss gives the same update from micro-batches as from the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import Trainer
from diptych.losses import available_losses, get_loss_class
from diptych.losses.contract import Case

NAMES = list(available_losses())


def gradients(name: str, microbatch_size: int | None) -> dict[str, Tensor]:
    """Return an update's loss and gradients, with one encoder for each floating input."""
    case = Case(get_loss_class(name).example)
    loss, inputs = case.loss(), case.inputs()
    batch = {f"input_{i}": x for i, x in enumerate(inputs)}
    model = nn.ModuleDict(
        {k: nn.Linear(8, 8, dtype=x.dtype) for k, x in batch.items() if x.is_floating_point()}
    )

    def task(model: nn.ModuleDict, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: model[k](x) if k in model else x for k, x in batch.items()}

    parameters: list[Any] = [*model.parameters(), *loss.parameters()]
    trainer = Trainer(
        model,
        loss,
        torch.optim.SGD(parameters, lr=0.0),
        task=task,
        microbatch_size=microbatch_size,
        device="cpu",
    )
    trainer.run([batch], max_epochs=1)
    named = [*model.named_parameters(), *loss.named_parameters()]
    return {
        "loss": trainer.state.output.loss,
        **{n: p.grad for n, p in named if p.grad is not None},
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_the_same_in_micro_batches_of_any_size(name: str) -> None:
    torch.manual_seed(0)
    whole = gradients(name, None)

    for size in (1, 4):
        torch.manual_seed(0)
        pieces = gradients(name, size)
        assert pieces.keys() == whole.keys()
        torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-14)
