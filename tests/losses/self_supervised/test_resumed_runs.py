"""A resumed run of a self-supervised loss with a state equals the uninterrupted one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import Trainer, tasks
from diptych.handlers import CheckpointManager, Curriculum, MomentumEncoder
from diptych.losses import DINOLoss, SIGRegLoss
from tests.losses.oracles import draw

BATCHES = [
    {"large": draw(4, 2, 6).float(), "small": draw(4, 1, 6).float()},
    {"large": draw(3, 2, 6).float(), "small": draw(3, 1, 6).float()},
]


class Encoder(nn.Module):
    """A linear encoder, with a momentum target if DINO trains it."""

    def __init__(self, *, target: bool) -> None:
        super().__init__()
        self.online = nn.Linear(6, 8)
        if target:
            self.target = copy.deepcopy(self.online)

    def forward(self, crops: Tensor) -> Tensor:
        return self.online(crops)


def run(folder: Path, name: str, epochs: int) -> dict[str, Tensor]:
    """Train in a folder, from its last checkpoint on; return the state of model and loss."""
    torch.manual_seed(0)
    model = Encoder(target=name == "dino")
    loss = DINOLoss(dim=8) if name == "dino" else SIGRegLoss(global_views=2)
    optimizer = torch.optim.SGD(model.online.parameters(), lr=0.1)
    trainer = Trainer(
        model, loss, optimizer, task=tasks.multi_crop, microbatch_size=2, device="cpu", seed=0
    )
    trainer.attach(CheckpointManager(folder))
    if name == "dino":
        temperature = Curriculum("loss.teacher_temperature", start=0.04, end=0.07, over=3)
        trainer.attach(MomentumEncoder(momentum=0.5), temperature)
    trainer.run(BATCHES, max_epochs=epochs)
    return {**model.state_dict(), **loss.state_dict()}


@pytest.mark.parametrize("name", ["dino", "sigreg"])
def test_centre_directions_and_teacher_continue_after_an_interruption(
    name: str, tmp_path: Path
) -> None:
    expected = run(tmp_path / "whole", name, 3)
    run(tmp_path / "parts", name, 1)
    torch.testing.assert_close(run(tmp_path / "parts", name, 3), expected, rtol=0, atol=0)
