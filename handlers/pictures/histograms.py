"""Histograms of weights and gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import attrs
from torch import Tensor

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.dtensor import full_tensor
from diptych.engine.events import StepEvents
from diptych.engine.modules import named_parameters
from diptych.engine.trainer import Trainer
from diptych.handlers.pictures.board_handler import BoardHandler

BINS = 64


@attrs.define(kw_only=True, eq=False)
class Histograms(BoardHandler):
    """Shows histograms of each parameter and its gradient in TensorBoard.

    The tags are `weights/<parameter>` and `weight_gradients/<parameter>`. The values are those just
    before an update; values that are not finite are left out.

    Event: `StepEvents.GRADIENTS_READY` every `every` iterations. Draws on rank 0 only; the
        parameters of a sharded model are gathered from all ranks, one after another.
    Cost: all weights and gradients are copied to the host, which waits for the device, so set
        `every` to a few hundred iterations or more. About 2 kB of disk for each parameter, each
        time.

    Args:
        every: iterations between two drawings.
        gradients: whether to show gradients too.
        board: where to draw; None: the attached `TensorBoard`. A board that is not attached is
            attached with this handler.

    Raises:
        ValueError: if `every` is below 1; at the first drawing, if there is no board.
    """

    every: int = attrs.field(default=500, validator=whole_number(of="iterations"))
    gradients: bool = True

    def listen(self, trainer: Trainer) -> None:
        """Draw on the trainer's events."""
        trainer.every(self.every, self.draw, StepEvents.GRADIENTS_READY)

    def draw(self, trainer: Trainer) -> None:
        """Draw the current weights and gradients."""
        step = trainer.state.iteration
        with self._board_of(trainer).open_writer() if rank() == 0 else nullcontext() as writer:
            for name, parameter in named_parameters(trainer.model, trainer.loss).items():
                self._add(writer, f"weights/{name}", parameter, step)
                if self.gradients and parameter.grad is not None:
                    self._add(writer, f"weight_gradients/{name}", parameter.grad, step)

    def _add(self, writer: Any, tag: str, values: Tensor, step: int) -> None:
        values = full_tensor(values.detach())
        if writer is None:
            return
        values = values.to_dense().float().cpu()
        finite = values[values.isfinite()]
        if len(finite):
            with self.tolerated(lost=1):
                writer.add_histogram(tag, finite, step, bins=BINS)
