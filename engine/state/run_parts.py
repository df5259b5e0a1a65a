"""The parts of a trainer that its identity and the states of its handlers are read from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from ignite.engine import State
from torch import nn
from torch.optim import Optimizer

from diptych.engine.loop.listener import Listener
from diptych.engine.settings import TrainerSettings


class RunParts(Protocol):
    """A `Trainer`, as far as this package reads it; the trainer's module imports this package."""

    model: nn.Module
    optimizer: Optimizer
    settings: TrainerSettings
    device: torch.device
    task: Any
    transform: Any
    step: Any
    metrics: Any
    handlers: list[Any]
    state: State
    described_loader: Any

    @property
    def loss(self) -> nn.Module:
        """The loss."""

    @property
    def listeners(self) -> Sequence[Listener]:
        """The functions at the trainer's events."""

    @property
    def resting_parts(self) -> Sequence[nn.Module]:
        """The parts of model and loss that are in eval mode in the next step."""

    @property
    def state_dict_user_keys(self) -> list[str]:
        """The names of the attributes of the state that `state_dict` holds."""
