"""The base class of handlers that draw into TensorBoard."""

from __future__ import annotations

import attrs

from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.trainer import Trainer
from diptych.handlers.output.output_handler import OutputHandler
from diptych.handlers.sinks.tensorboard import TensorBoard

VISUAL = "visual"
"""The first part of the tags of pictures: TensorBoard's first tab orders groups of tags by name,
and pictures come after the curves."""


@attrs.define(eq=False)
class BoardHandler(OutputHandler):
    """Draws into a `TensorBoard`: its own `board`, or the one attached to the trainer.

    A `board` that is not attached is attached with the handler. Rank 0 draws; with a sharded model
    all ranks are called, because reading its parameters and running it are collective. An error
    while a picture is drawn or written is logged, and the run continues; an error of the model that
    is run for a picture reaches the caller, since other ranks may take part.
    """

    board: TensorBoard | None = attrs.field(default=None, kw_only=True)

    def attach(self, trainer: Trainer) -> None:
        """Draw on the trainer's events."""
        if self.board is not None and self.board not in trainer.handlers:
            trainer.attach(self.board)
        if rank() == 0 or has_shards(trainer.model):
            self.listen(trainer)

    @property
    def destination(self) -> str:
        """The pictures."""
        return "pictures"

    def _board_of(self, trainer: Trainer) -> TensorBoard:
        """Return the board to draw into."""
        boards = [self.board] if self.board else trainer.handlers_of(TensorBoard)
        if not boards:
            raise ValueError(
                f"{type(self).__name__} needs a TensorBoard among the trainer's handlers, got "
                "none. Attach TensorBoard(run_dir) or default_handlers(run_dir)."
            )
        return boards[0]
