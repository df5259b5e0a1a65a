"""How weights and gradients are distributed."""

from __future__ import annotations

from typing import Any

import attrs
from torch import Tensor

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.dtensor import has_shards, whole
from diptych.engine.events import StepEvents
from diptych.engine.trainer import Trainer
from diptych.handlers.components import parameter_names
from diptych.handlers.sinks.tensorboard import TensorBoard, attach_board_of, board_of

BINS = 64


@attrs.define(kw_only=True, eq=False)
class Histograms:
    """Shows the distributions of weights and gradients in TensorBoard, parameter by parameter.

    `weights/<parameter>` and `weight_gradients/<parameter>`, as they are when an update is about to
    be made; values that are not finite are left out.

    Event: `StepEvents.GRADIENTS_READY` every `every` iterations. Rank 0 alone draws; the
        parameters of a sharded model are gathered from all ranks, one after another.
    Cost: all weights and gradients are copied to the host, which waits for the device: give `every`
        a few hundred iterations or more. Some 1 kB of disk for each parameter and look, twice.

    Args:
        every: iterations between two looks.
        gradients: whether to show gradients too.
        board: where to draw; None: the `TensorBoard` that is attached. One that is not attached is
            attached with this handler.

    Raises:
        ValueError: if `every` is below 1; at the first look, if there is no board.
    """

    every: int = attrs.field(default=500, validator=whole_number(of="iterations"))
    gradients: bool = True
    board: TensorBoard | None = None

    def attach(self, trainer: Trainer) -> None:
        """Draw when gradients are ready."""
        attach_board_of(self, trainer)
        if rank() == 0 or has_shards(trainer.model):  # which all ranks gather
            trainer.every(self.every, self.draw, StepEvents.GRADIENTS_READY)

    def draw(self, trainer: Trainer) -> None:
        """Draw the weights and gradients of now."""
        writer = board_of(trainer, self).writer if rank() == 0 else None
        step = trainer.state.iteration
        for name, parameter in parameter_names(trainer).items():
            self._add(writer, f"weights/{name}", parameter, step)
            if self.gradients and parameter.grad is not None:
                self._add(writer, f"weight_gradients/{name}", parameter.grad, step)

    def _add(self, writer: Any, tag: str, values: Tensor, step: int) -> None:
        values = whole(values.detach())
        if writer is None:
            return
        values = values.float().cpu()
        finite = values[values.isfinite()]
        if len(finite):
            writer.add_histogram(tag, finite, step, bins=BINS)
