"""Contexts of a trial: what they restore is as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.engine.trials.restored import buffers_restored


class Counting(nn.Module):
    """A module that changes one buffer and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("changed", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))

    def forward(self, value: Tensor) -> Tensor:
        self.changed += 1
        self.replaced = self.replaced + 1
        return value


def test_buffers_are_restored_whether_they_were_changed_or_replaced():
    module = nn.Sequential(Counting())
    held = dict(module.named_buffers())
    with buffers_restored(module):
        module(torch.ones(1))
        assert module[0].replaced.sum() == 2
    assert all(buffer is held[name] for name, buffer in module.named_buffers())
    assert not any(buffer.any() for buffer in module.buffers())
