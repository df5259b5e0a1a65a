"""The number of Python calls of an update, which bounds its cost where the host is the limit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diptych.engine import Trainer
from diptych.losses import CLIPLoss
from tests.python_calls import calls

MORE_CALLS = 68
"""Calls of an update beyond those of a raw loop; 58 when this was written."""


def tower(layers: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(8, 8), nn.GELU())))


def two_towers(model: Any, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"image": model[0](batch[0]), "text": model[1](batch[1])}


def test_an_update_makes_few_python_calls_beside_a_raw_loop():
    model, loss = nn.ModuleList([tower(2), tower(8)]), CLIPLoss()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()])
    batch = torch.randn(4, 8), torch.randn(4, 8)
    trainer = Trainer(model, loss, optimizer, task=two_towers, device="cpu")

    def raw() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(*two_towers(model, batch).values()).backward()
        optimizer.step()

    for _ in range(3):
        raw()
        trainer.make_update(batch)
    assert calls(lambda: trainer.make_update(batch)) - calls(raw) < MORE_CALLS


def test_the_snapshot_before_a_step_makes_few_python_calls():
    model = tower(10)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = Trainer(model, nn.MSELoss(), optimizer, task=two_towers, device="cpu")
    for _ in range(2):
        trainer._snapshot.take()
    assert calls(trainer._snapshot.take) < 14
